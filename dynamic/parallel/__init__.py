"""One model over several processes: groups of ranks, shards of weights, the plan that workers follow."""
