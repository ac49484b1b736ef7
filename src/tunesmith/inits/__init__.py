"""Inits of LoRA's factors, one file each: functions of a dense weight, or of nothing but the shapes."""
