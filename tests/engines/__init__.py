"""Every engine against an oracle, and proof that the comparison would notice."""
