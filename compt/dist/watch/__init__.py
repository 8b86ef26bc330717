"""The watch over ranks: names the rank that hangs or dies, and ends the job."""
