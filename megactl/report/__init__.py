"""What happened: reads back what a run or a log left behind. No torch."""
