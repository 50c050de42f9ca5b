package main

import "fmt"

// rows are the third table: the two programs and ZDS between them.
func (s *snapshots) rows(pods int) [][]string {
	values := func(of func(r snapshotRound) float64) []float64 { return column(s.rounds, of) }
	milliseconds := func(of func(r snapshotRound) float64) []float64 {
		return values(func(r snapshotRound) float64 { return of(r) * 1e3 })
	}
	files := func(of func(r snapshotRound) usage) []int {
		var each []int
		for _, r := range s.rounds {
			each = append(each, of(r).files)
		}
		return each
	}
	kibibytes := func(of func(r snapshotRound) usage) []float64 {
		return values(func(r snapshotRound) float64 { return float64(of(r).resident) / float64(pods) / 1024 })
	}
	agent := func(r snapshotRound) usage { return r.agentAdded }
	ztunnel := func(r snapshotRound) usage { return r.ztunnelAdded }

	aim := fmt.Sprintf("< %d ms", aimSnapshot.Milliseconds())
	both := milliseconds(func(r snapshotRound) float64 { return r.both.Seconds() })
	memory := kibibytes(ztunnel)
	return [][]string{
		{fmt.Sprintf("a snapshot of %d pods", pods), "value", "aim", ""},
		{
			"`cni-emulator serve` and a fresh `ztunnel-emulator`, connected to ready", spread("%.0f", both) + " ms",
			aim, verdict(quantile(both, 0.5) < aimSnapshot.Seconds()*1e3),
		},
		{"pods a second", spread("%.0f", values(func(r snapshotRound) float64 { return float64(pods) / r.both.Seconds() })), "", ""},
		{"from ztunnel's fork to ready", spread("%.0f", milliseconds(func(r snapshotRound) float64 { return r.start.Seconds() })) + " ms", "", ""},
		{"the agent alone: ztunnel only acks", spread("%.0f", milliseconds(func(r snapshotRound) float64 { return r.agent.Seconds() })) + " ms", "", ""},
		{"ztunnel alone: the agent only sends", spread("%.0f", milliseconds(func(r snapshotRound) float64 { return r.ztunnel.Seconds() })) + " ms", "", ""},
		{"both, `lo` down in every pod, as `ip netns add` leaves it", fmt.Sprintf("%d ms", s.down.both.Milliseconds()), aim, verdict(s.down.both < aimSnapshot)},
		filesRow("descriptors a pod, ztunnel: with the four of DNS", files(ztunnel), pods, filesForAZDSPod),
		filesRow("descriptors a pod, agent", files(agent), pods, agentsForAPod),
		{"resident memory a pod, ztunnel", spread("%.1f", memory) + " KiB", fmt.Sprintf("< %d KiB", aimBytes>>10), verdict(quantile(memory, 0.5)*1024 < aimBytes)},
		{"resident memory a pod, agent", spread("%.1f", kibibytes(agent)) + " KiB", "", ""},
		s.idle.row("ztunnel", s.idle.ztunnel),
		s.idle.row("agent", s.idle.agent),
	}
}

// row is about one of the two.
func (i idleness) row(name string, ticks int) []string {
	return []string{fmt.Sprintf("CPU in %v of idleness, %s", i.over, name), fmt.Sprintf("%d ticks of 10 ms", ticks), "0", verdict(ticks == 0)}
}
