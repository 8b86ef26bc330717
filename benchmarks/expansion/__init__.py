"""Which operator should grow a model? Students grown in different ways, trained alike."""
