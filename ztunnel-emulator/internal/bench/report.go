package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// results is everything measured.
type results struct {
	handoffs  handoffs
	processes processes
	loads     []load
	snapshots snapshots
}

// The aims. Times are multiples of the floor's median.
const (
	aimReceiver  = 3.0
	reachFor     = 2.0
	aimWhole     = 6.0
	aimProcess   = 1.5
	aimBytes     = 12 << 10 // resident, a pod
	filesForAPod = 4        // three listeners and the namespace
	// In ZDS mode also four for DNS: UDP and TCP, on 127.0.0.1 and on ::1.
	filesForAZDSPod = 8

	aimSnapshot   = 500 * time.Millisecond
	agentsForAPod = 1 // the namespace
)

// table renders the results in Markdown.
func (r *results) table(o options) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d pods; %s for (a) to (c), (e) and (f), one for (d), %d for the rest. Floor and measured take turns, %d of each\n", o.pods, plural(o.rounds, "round"), o.loads, o.inTurns)
	b.WriteString("for (a) to (c), (e) and (f), one of each for (d). A ratio is of medians; in brackets are the least and the most of one round.\n\n")

	h, p := &r.handoffs, &r.processes
	sideAim := fmt.Sprintf("≤ %g, reach for %g", aimReceiver, reachFor)
	rows := [][]string{
		{"", "time", "p50", "p99", "max", "ratio", "aim", ""},
		timeRow("(a)", "the floor: `setns`, 3 × `socket`/`bind`/`listen`, `setns` back", &h.floor, nil, 0, ""),
		timeRow("(b)", "the receiver alone: descriptor received to reply written", &h.seed.alone, &h.floor, aimReceiver, sideAim),
		timeRow("(c)", "end to end: the sender's write to its reply", &h.seed.whole, &h.floor, aimWhole, fmt.Sprintf("≤ %g", aimWhole)),
		timeRow("(d)", "a process that only dials, sends and reads the reply", &p.floor, nil, 0, ""),
		timeRow("", "the process `cni-emulator`, fork to exit", &p.cni, &p.floor, aimProcess, fmt.Sprintf("≤ %g", aimProcess)),
		timeRow("(e)", "ZDS, ztunnel's side: `add` received to ack sent", &h.zds.alone, &h.floor, aimReceiver, sideAim),
		timeRow("(f)", "ZDS, the agent's side: `add` sent to ack received", &h.zds.whole, &h.floor, 0, ""),
	}
	for row, t := range map[int]*trial{2: &h.seed.alone, 6: &h.zds.alone} {
		if all, _, _ := t.ratio(&h.floor); all <= reachFor {
			rows[row][7] += fmt.Sprintf(", %g too", reachFor)
		}
	}
	b.WriteString(markdown(rows))
	b.WriteString("\n")

	rows = [][]string{{"the process `ztunnel-emulator`", "value", "aim", ""}}
	rows = append(rows, filesRow("descriptors a pod", allFiles(r.loads), o.pods, filesForAPod))
	for _, l := range r.loads {
		rows = append(rows, memoryRow(l))
	}
	for _, l := range r.loads {
		each := column(l.rounds, func(lr loadRound) float64 { return lr.perSecond })
		rows = append(rows, []string{"pods a second, " + plural(l.senders, "sender"), spread("%.0f", each), "", ""})
	}
	b.WriteString(markdown(rows))
	b.WriteString("\n")
	b.WriteString(markdown(r.snapshots.rows(o.pods)))
	return b.String()
}

func timeRow(name, what string, t, floor *trial, aim float64, aimText string) []string {
	row := []string{name, what, duration(t.all.p50()), duration(t.all.p99()), duration(t.all.most()), "1", aimText, ""}
	if floor != nil {
		all, least, most := t.ratio(floor)
		row[5] = fmt.Sprintf("%.2f", all)
		if len(t.rounds) > 1 {
			row[5] += fmt.Sprintf(" (%.2f to %.2f)", least, most)
		}
		if aimText != "" {
			row[7] = verdict(all <= aim)
		}
	}
	return row
}

func memoryRow(l load) []string {
	each := column(l.rounds, func(lr loadRound) float64 { return lr.bytesAPod / 1024 })
	return []string{
		"resident memory a pod, " + plural(l.senders, "sender"), spread("%.1f", each) + " KiB",
		fmt.Sprintf("< %d KiB", aimBytes>>10), verdict(quantile(each, 0.5)*1024 < aimBytes),
	}
}

// allFiles are the descriptors of all loads.
func allFiles(loads []load) []int {
	var files []int
	for _, l := range loads {
		for _, round := range l.rounds {
			files = append(files, round.filesInAll)
		}
	}
	return files
}

// filesRow is about all rounds: in none may a single descriptor be too many.
func filesRow(what string, each []int, pods, aim int) []string {
	met := true
	for _, files := range each {
		met = met && files == aim*pods
	}
	return []string{what, fmt.Sprintf("%g", float64(slices.Max(each))/float64(pods)), fmt.Sprintf("exactly %d", aim), verdict(met)}
}

func column[T any](rounds []T, of func(T) float64) []float64 {
	var values []float64
	for _, round := range rounds {
		values = append(values, of(round))
	}
	return values
}

func spread(format string, values []float64) string {
	s := fmt.Sprintf(format, quantile(values, 0.5))
	if len(values) > 1 {
		s += fmt.Sprintf(" ("+format+" to "+format+")", quantile(values, 0), quantile(values, 1))
	}
	return s
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func verdict(met bool) string {
	if met {
		return "met"
	}
	return "NOT MET"
}

func duration(d time.Duration) string {
	if d < time.Millisecond {
		return fmt.Sprintf("%.1f µs", float64(d.Nanoseconds())/1e3)
	}
	return fmt.Sprintf("%.2f ms", d.Seconds()*1e3)
}

// markdown renders rows as a table that can be read unrendered; the first is
// its head.
func markdown(rows [][]string) string {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	for n, row := range rows {
		for i, cell := range row {
			b.WriteString("| " + cell + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+1))
		}
		b.WriteString("|\n")
		if n == 0 {
			for _, width := range widths {
				b.WriteString("|" + strings.Repeat("-", width+2))
			}
			b.WriteString("|\n")
		}
	}
	return b.String()
}
