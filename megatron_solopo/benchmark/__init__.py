"""Speed and memory of training: the package's modes and TRL's trainer on the same pairs, in interleaved processes."""
