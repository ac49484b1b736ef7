"""Where LoRA's factors may start, one file per way: functions of a dense weight, or of nothing but the shapes."""
