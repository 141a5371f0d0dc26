"""The process around a stage: time, progress, seeds, hardware, ranks."""
