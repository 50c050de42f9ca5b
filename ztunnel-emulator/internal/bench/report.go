package main

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// results is everything measured.
type results struct {
	handoffs  handoffs
	processes processes
	loads     []load
}

// The aims. Times are multiples of the floor's median.
const (
	aimReceiver  = 3.0
	reachFor     = 2.0
	aimWhole     = 6.0
	aimProcess   = 1.5
	aimBytes     = 12 << 10 // resident, a pod
	filesForAPod = 4        // three listeners and the namespace
)

// table renders the results in Markdown.
func (r *results) table(o options) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d namespaces; %d rounds for (a) to (c), one for (d), %d for the rest. Floor and measured take turns, %d and %d\n", o.pods, o.rounds, o.loads, o.inTurns, o.inTurns)
	b.WriteString("for (a) to (c), one and one for (d). A ratio is of medians; in brackets are the least and the most of one round.\n\n")

	h, p := &r.handoffs, &r.processes
	rows := [][]string{
		{"", "time", "p50", "p99", "max", "ratio", "aim", ""},
		timeRow("(a)", "the floor: `setns`, 3 × `socket`/`bind`/`listen`, `setns` back", &h.floor, nil, 0, ""),
		timeRow("(b)", "the receiver alone: descriptor received to reply written", &h.receiver, &h.floor, aimReceiver, fmt.Sprintf("≤ %g, reach for %g", aimReceiver, reachFor)),
		timeRow("(c)", "end to end: the sender's write to its reply", &h.whole, &h.floor, aimWhole, fmt.Sprintf("≤ %g", aimWhole)),
		timeRow("(d)", "a process that only dials, sends and reads the reply", &p.floor, nil, 0, ""),
		timeRow("", "the process `cni-emulator`, fork to exit", &p.cni, &p.floor, aimProcess, fmt.Sprintf("≤ %g", aimProcess)),
	}
	if all, _, _ := h.receiver.ratio(&h.floor); all <= reachFor {
		rows[2][7] += fmt.Sprintf(", %g too", reachFor)
	}
	b.WriteString(markdown(rows))
	b.WriteString("\n")

	rows = [][]string{{"the process `ztunnel-emulator`", "value", "aim", ""}}
	rows = append(rows, filesRow(r.loads, o.pods))
	for _, l := range r.loads {
		rows = append(rows, memoryRow(l))
	}
	for _, l := range r.loads {
		each := column(l, func(lr loadRound) float64 { return lr.perSecond })
		rows = append(rows, []string{"pods a second, " + plural(l.senders), spread("%.0f", each), "", ""})
	}
	b.WriteString(markdown(rows))
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
		row[7] = verdict(all <= aim)
	}
	return row
}

func memoryRow(l load) []string {
	each := column(l, func(lr loadRound) float64 { return lr.bytesAPod / 1024 })
	return []string{
		"resident memory a pod, " + plural(l.senders), spread("%.1f", each) + " KiB",
		fmt.Sprintf("< %d KiB", aimBytes>>10), verdict(quantile(each, 0.5)*1024 < aimBytes),
	}
}

// filesRow is about all loads: in none may a single descriptor be too many.
func filesRow(loads []load, pods int) []string {
	met, files := true, 0
	for _, l := range loads {
		for _, round := range l.rounds {
			files = max(files, round.filesInAll)
			met = met && round.filesInAll == filesForAPod*pods
		}
	}
	return []string{"descriptors a pod", fmt.Sprintf("%g", float64(files)/float64(pods)), fmt.Sprintf("exactly %d", filesForAPod), verdict(met)}
}

func column(l load, of func(loadRound) float64) []float64 {
	var values []float64
	for _, round := range l.rounds {
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

func plural(senders int) string {
	if senders == 1 {
		return "1 sender"
	}
	return fmt.Sprintf("%d senders", senders)
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

// resultsFile is RESULTS.md: the table and the machine that made it.
func resultsFile(table string) string {
	return "# What a handoff costs\n\n" +
		"Written by `scripts/bench/run`.\n\n" + machine() + "\n" + table
}

// machine describes where this runs, without saying which one it is.
func machine() string {
	var uts unix.Utsname
	kernel := "unknown"
	if unix.Uname(&uts) == nil {
		kernel = unix.ByteSliceToString(uts.Release[:])
	}
	var info unix.Sysinfo_t
	unix.Sysinfo(&info)
	memory := float64(info.Totalram) * float64(info.Unit) / (1 << 30)
	return fmt.Sprintf("%s: Linux %s, %s, %d cores, %.0f GiB of memory, %s.\n",
		time.Now().UTC().Format(time.DateOnly), kernel, cpuModel(), runtime.NumCPU(), memory, runtime.Version())
}

func cpuModel() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range bytes.Lines(b) {
		if key, value, ok := strings.Cut(string(line), ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "a CPU without a name (" + runtime.GOARCH + ")"
}
