"""The watch over ranks: who hangs or dies is named, and the job ends."""
