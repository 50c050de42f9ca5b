package main

import (
	"cmp"
	"slices"
	"time"
)

// samples are times of the same thing.
type samples []time.Duration

// trial is samples of several rounds.
type trial struct {
	all    samples
	rounds []samples
}

func (t *trial) add(round samples) {
	t.rounds = append(t.rounds, round)
	t.all = append(t.all, round...)
}

// quantile returns the value below which the part q of the values lies.
func quantile[T cmp.Ordered](values []T, q float64) T {
	if len(values) == 0 {
		var zero T
		return zero
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func (s samples) p50() time.Duration { return quantile(s, 0.50) }
func (s samples) p99() time.Duration { return quantile(s, 0.99) }

func (s samples) most() time.Duration { return quantile(s, 1) }

// ratio says how many times floor's median t's median is, in all and in the
// rounds between which it was least and most.
func (t *trial) ratio(floor *trial) (all, least, most float64) {
	all = t.all.p50().Seconds() / floor.all.p50().Seconds()
	least, most = all, all
	for i := range t.rounds {
		r := t.rounds[i].p50().Seconds() / floor.rounds[i].p50().Seconds()
		least, most = min(least, r), max(most, r)
	}
	return all, least, most
}
