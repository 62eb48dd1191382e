"""Reading the logs of training runs: a compiled scanner finds what matters, one parser a system makes runs of it. No torch, no numpy."""
