"""Which chats share a row. Speed only: packed rows have the loss of separate ones."""


def best_fit(lengths, room):
    """Pack examples of these lengths into bins of `room` tokens; returns their indices, bin by bin.

    Best fit decreasing, as TRL packs: the longest example first, each into the fullest bin that
    still has room for it. No example is split.
    """
    bins = []  # the indices in each bin
    free = []  # the tokens left in each bin
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in longest_first:
        fitting = [b for b, left in enumerate(free) if left >= lengths[i]]
        if not fitting:
            fitting = [len(bins)]  # a new bin
            bins.append([])
            free.append(room)
        fullest = min(fitting, key=lambda b: free[b])
        bins[fullest].append(i)
        free[fullest] -= lengths[i]
    return bins
