"""Early exits: segments, probes, policies, calibration, certificates and their monitor."""
