"""Early exits: segments, probes, policies, calibration."""
