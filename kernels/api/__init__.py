"""What all backends share: types, weight formats, router rules, tolerances."""
