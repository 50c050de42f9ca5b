package main

import (
	"fmt"
	"strings"
)

// The aims for an idle relayed connection.
const (
	aimIdleBytes = 12 << 10
	idleFiles    = 2 // the two sockets
)

// measure is a row of the table for each comparison.
type measure struct {
	what   string
	of     func(trafficRound) float64
	format string
	more   bool                     // is better
	aim    func(comparison) float64 // of the ratio to the floor; nil for none
	apart  func(comparison, []float64) (aim, verdict string)
	base   bool   // no mesh has it, too
	sum    bool   // of all rounds, for the median
	reach  string // behind the aim
}

func measures() []measure {
	var all []measure
	for i, n := range streams {
		all = append(all, measure{
			what: "throughput, " + plural(n, "stream") + ", GiB/s", format: "%.2f", more: true, base: true,
			of:  func(r trafficRound) float64 { return r.throughput[i] / (1 << 30) },
			aim: func(c comparison) float64 { return c.throughput }, reach: ", reach for 1",
		})
	}
	return append(all,
		measure{
			what: "round trips of 1 KiB a second", format: "%.0f", more: true, base: true,
			of: func(r trafficRound) float64 { return r.trips },
		},
		measure{
			what: "a round trip, p50, µs", format: "%.1f", base: true,
			of:  func(r trafficRound) float64 { return r.p50 * 1e6 },
			aim: func(c comparison) float64 { return c.latency },
		},
		measure{
			what: "a round trip, p99, µs", format: "%.1f", base: true,
			of: func(r trafficRound) float64 { return r.p99 * 1e6 },
		},
		measure{
			what: "CPU of what relays, µs a round trip", format: "%.1f",
			of: func(r trafficRound) float64 { return r.tripCPU * 1e6 },
		},
		measure{
			what: "new connections a second, 8 at once", format: "%.0f", more: true, base: true,
			of: func(r trafficRound) float64 { return r.conns },
		},
		measure{
			what: "new connections that failed, in all", format: "%g", base: true, sum: true,
			of:    func(r trafficRound) float64 { return r.failed },
			apart: noFailure,
		},
		measure{
			what: "CPU of what relays, s/GiB", format: "%.2f",
			of: func(r trafficRound) float64 { return r.cpu },
		},
		measure{
			what: "resident, an idle connection, KiB", format: "%.1f",
			of:    func(r trafficRound) float64 { return r.idle.resident / 1024 },
			apart: idleMemory,
		},
		measure{
			what: "descriptors, an idle connection", format: "%g",
			of:    func(r trafficRound) float64 { return r.idle.files },
			apart: idleDescriptors,
		})
}

func noFailure(_ comparison, each []float64) (aim, met string) {
	return "0", verdict(total(each) == 0)
}

func total(each []float64) (sum float64) {
	for _, n := range each {
		sum += n
	}
	return sum
}

func idleMemory(_ comparison, each []float64) (aim, met string) {
	return fmt.Sprintf("≤ %d KiB", aimIdleBytes>>10), verdict(quantile(each, 0.5)*1024 <= aimIdleBytes)
}

func idleDescriptors(_ comparison, each []float64) (aim, met string) {
	all := true
	for _, n := range each {
		all = all && n == idleFiles
	}
	return fmt.Sprintf("exactly %d", idleFiles), verdict(all)
}

// trafficTable renders the rounds in Markdown, by variant.
func trafficTable(o trafficOptions, rounds map[string][]trafficRound) string {
	var b strings.Builder
	fmt.Fprintf(&b, "A pod on each of two nodes; %s, in which all take turns, throughput and connections over %v, %d round trips, %d idle connections. Values are medians. A\n", plural(o.rounds, "round"), o.each, o.trips, o.idle)
	fmt.Fprintf(&b, "connection has failed that has not ended well within %v. The floor is one thread of epoll and splice in the place of each ztunnel. A ratio is the median of the\n", connectTimeout)
	b.WriteString("rounds' own; in brackets are the least and the most.\n")
	for _, c := range comparisons {
		if len(rounds[c.measured.name]) == 0 && len(rounds[c.floor.name]) == 0 {
			continue
		}
		b.WriteString("\n")
		b.WriteString(markdown(c.rows([]string{"captured: " + c.name, noMesh.name, "floor", "ztunnel", "ratio to the floor", "aim", ""}, measures(), rounds)))
	}
	return b.String()
}

func (c comparison) rows(head []string, measures []measure, rounds map[string][]trafficRound) [][]string {
	rows := [][]string{head}
	for _, m := range measures {
		values := func(v variant) []float64 { return column(rounds[v.name], m.of) }
		middle := func(each []float64) string {
			if len(each) == 0 {
				return ""
			}
			value := quantile(each, 0.5)
			if m.sum {
				value = total(each)
			}
			return fmt.Sprintf(m.format, value)
		}
		base, floor, ours := values(noMesh), values(c.floor), values(c.measured)
		row := []string{m.what, "", middle(floor), middle(ours), "", "", ""}
		if m.base {
			row[1] = middle(base)
		}
		var ratios []float64
		for i := range min(len(floor), len(ours)) {
			ratios = append(ratios, ours[i]/floor[i])
		}
		if len(ratios) > 0 {
			if quantile(floor, 0) > 0 {
				row[4] = spread("%.2f", ratios)
			}
			if m.aim != nil {
				row[5], row[6] = ratioVerdict(m, m.aim(c), quantile(ratios, 0.5))
			}
			if m.apart != nil {
				row[5], row[6] = m.apart(c, ours)
			}
		}
		rows = append(rows, row)
	}
	return rows
}

func ratioVerdict(m measure, aim, ratio float64) (text, met string) {
	if m.more {
		return fmt.Sprintf("≥ %g", aim) + m.reach, verdict(ratio >= aim)
	}
	return fmt.Sprintf("≤ %g", aim), verdict(ratio <= aim)
}
