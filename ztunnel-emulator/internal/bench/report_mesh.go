package main

import (
	"fmt"
	"strings"
)

// meshMeasures are the rows of the mesh's table. The floor is the limit.
func meshMeasures() []measure {
	var all []measure
	for i, aim := range [len(streams)]float64{0: 0.9, 2: 0.8} {
		m := measure{
			what: "throughput, " + plural(streams[i], "stream") + ", GiB/s", format: "%.2f", more: true, base: true,
			of: func(r trafficRound) float64 { return r.throughput[i] / (1 << 30) },
		}
		if aim != 0 {
			m.aim = always(aim)
		}
		all = append(all, m)
	}
	return append(all,
		measure{
			what: "CPU of what relays, s/GiB", format: "%.2f",
			of: func(r trafficRound) float64 { return r.cpu },
		},
		measure{
			what: "round trips of 1 KiB a second", format: "%.0f", more: true, base: true,
			of: func(r trafficRound) float64 { return r.trips },
		},
		measure{
			what: "a round trip, p50, µs", format: "%.1f", base: true,
			of:  func(r trafficRound) float64 { return r.p50 * 1e6 },
			aim: always(1.25),
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
			what: "new connections a second, tunnel pooled", format: "%.0f", more: true, base: true,
			of:  func(r trafficRound) float64 { return r.conns },
			aim: always(2.5),
		},
		measure{
			what: "new connections a second, a tunnel each", format: "%.0f", more: true,
			of: func(r trafficRound) float64 { return r.connsApart },
		},
		measure{
			what: "new connections that failed, in all", format: "%g", base: true, sum: true,
			of:    func(r trafficRound) float64 { return r.failed },
			apart: noFailure,
		},
		measure{
			what: "resident, an idle connection, KiB", format: "%.1f",
			of: func(r trafficRound) float64 { return r.idle.resident / 1024 },
		},
		measure{
			what: "resident, the same with a tunnel each, KiB", format: "%.1f",
			of: func(r trafficRound) float64 { return r.idleApart.resident / 1024 },
		},
		measure{
			what: "descriptors, an idle connection", format: "%.2f",
			of: func(r trafficRound) float64 { return r.idle.files },
		})
}

func always(aim float64) func(comparison) float64 {
	return func(comparison) float64 { return aim }
}

// meshTable renders the rounds in Markdown, by variant.
func meshTable(o trafficOptions, rounds map[string][]trafficRound) string {
	var b strings.Builder
	fmt.Fprintf(&b, "The same pods and numbers, %s; %d idle connections with a tunnel each. The limit is a relay on crypto/tls with as much\n", plural(o.rounds, "round"), apartIdle(o))
	b.WriteString("as ztunnel has of identities, marks and addresses, a TLS connection for each captured one, and no HTTP/2. For a tunnel each, ztunnel may\n")
	fmt.Fprintf(&b, "put one stream into a tunnel (`POOL_MAX_STREAMS_PER_CONNECTION=1`), and each of %d clients calls an address of its own, or one would wait\n", connecting)
	b.WriteString("for the other's. CPU and memory are of both sides: CPU the sum, memory the mean.\n\n")
	c := comparison{measured: hboneAll, floor: tlsLimit}
	b.WriteString(markdown(c.rows([]string{"both sides, mutual TLS", noMesh.name, "the limit", "HBONE", "ratio to the limit", "aim", ""}, meshMeasures(), rounds)))
	return b.String()
}
