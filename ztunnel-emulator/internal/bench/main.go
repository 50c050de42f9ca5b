// Command bench measures a handoff, on the seed's wire and on ZDS, against its
// floor, the bare system calls; captured traffic against its floor, one thread
// that splices; and the mesh against its limit, a relay on crypto/tls. It prints
// tables; scripts/bench/run builds what it needs and runs it in a private world.
// Floor and measured rounds take turns in the same run, so that a noisy machine
// disturbs both alike.
//
// It is a benchmark, not a test: an aim that is missed is printed, and the exit
// code is 0.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// No teleport may use the main thread (golang/go#34031).
func init() { runtime.LockOSThread() }

// options is what the flags say.
type options struct {
	ztunnel, cni, dialsend string // programs
	dir                    string // for namespaces, sockets and logs
	results                string // a file for the table, or empty

	pods    int // namespaces to hand over in a round
	rounds  int // of that in this process
	loads   int // to a ztunnel-emulator, for each number of senders and in a snapshot
	inTurns int // handoffs, then visits of the floor, before they take turns

	idle time.Duration // to watch the two programs do nothing

	part    string // all, handoff, traffic or mesh
	traffic trafficOptions
}

func main() {
	if len(os.Args) > 1 {
		if f, ok := inPod[os.Args[1]]; ok {
			if err := f(os.Args[2:]); err != nil {
				fmt.Fprintf(os.Stderr, "bench: %s: %v\n", os.Args[1], err)
				os.Exit(1)
			}
			return
		}
	}
	var o options
	flag.StringVar(&o.ztunnel, "ztunnel", "", "the `program` ztunnel-emulator")
	flag.StringVar(&o.cni, "cni", "", "the `program` cni-emulator")
	flag.StringVar(&o.dialsend, "dialsend", "", "the `program` that only dials, sends and reads the reply")
	flag.StringVar(&o.dir, "dir", "/run/bench", "a `folder` to make for namespaces, sockets and logs")
	flag.StringVar(&o.results, "results", "", "write the table to this `file` too")
	flag.IntVar(&o.pods, "pods", 1000, "how many namespaces to hand over in a round")
	flag.IntVar(&o.rounds, "rounds", 5, "how many rounds of all pods in this process")
	flag.IntVar(&o.loads, "loads", 5, "how many rounds of all pods to a ztunnel-emulator, for each number of senders and in a snapshot")
	flag.IntVar(&o.inTurns, "turns", 10, "how many of a kind are measured before the next kind has its turn")
	flag.DurationVar(&o.idle, "idle", 5*time.Second, "how long to watch the two programs do nothing")
	flag.StringVar(&o.part, "part", "all", "what to measure: `handoff, traffic, mesh` or all")
	o.traffic.flags()
	flag.Parse()

	// An interrupted run must not leave a ztunnel-emulator behind.
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	// Not here: this goroutine is locked to the main thread.
	done := make(chan error, 1)
	go func() { done <- run(ctx, o) }()
	if err := <-done; err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run measures everything and prints the tables.
func run(ctx context.Context, o options) error {
	if os.Getenv("PRIVATE_WORLD") == "" {
		return errors.New("this makes thousands of namespaces: run it with scripts/bench/run, in a world of its own")
	}
	if !slices.Contains([]string{"all", "handoff", "traffic", "mesh"}, o.part) {
		return fmt.Errorf("there is no part %q", o.part)
	}
	if err := os.MkdirAll(o.dir, 0o700); err != nil {
		return err
	}
	tables := ""
	for _, part := range []struct {
		name, title string
		measure     func(context.Context, options) (string, error)
	}{
		{"handoff", "What a handoff costs", runHandoffs},
		{"traffic", "What relaying costs", runTraffic},
		{"mesh", "What the mesh costs", runMesh},
	} {
		if o.part != "all" && o.part != part.name {
			continue
		}
		table, err := part.measure(ctx, o)
		if err != nil {
			return err
		}
		if tables != "" {
			tables += "\n"
		}
		tables += "## " + part.title + "\n\n" + table
	}
	fmt.Print(tables)
	if o.results == "" {
		return nil
	}
	return os.WriteFile(o.results, []byte(resultsFile(tables)), 0o644)
}

// note tells a waiting person what goes on.
func note(format string, a ...any) { fmt.Fprintf(os.Stderr, "bench: "+format+"\n", a...) }

// runHandoffs measures everything about handoffs and returns the tables.
func runHandoffs(ctx context.Context, o options) (string, error) {
	if err := enoughFiles(o.pods); err != nil {
		return "", err
	}
	note("make %d namespaces", 3*o.pods)
	w, err := makeWorld(o.dir, o.pods)
	if err != nil {
		return "", err
	}
	var r results
	note("hand them over in this process, %s", plural(o.rounds, "round"))
	if r.handoffs, err = measureHandoffs(ctx, w, o.rounds, o.inTurns); err != nil {
		return "", err
	}
	note("hand them over with processes")
	if r.processes, err = measureProcesses(ctx, o, w); err != nil {
		return "", err
	}
	for _, senders := range []int{1, 8, 64} {
		note("hand them over with %s at once, %s", plural(senders, "sender"), plural(o.loads, "round"))
		l, err := measureLoad(ctx, o, w, senders)
		if err != nil {
			return "", err
		}
		r.loads = append(r.loads, l)
	}
	note("tell a fresh ztunnel of all of them, %s", plural(o.loads, "round"))
	if r.snapshots, err = measureSnapshots(ctx, o, w); err != nil {
		return "", err
	}
	return r.table(o), nil
}

// enoughFiles checks the limit of open files for pods of this process (four on
// the seed's wire and eight on the other), and the floor's (three).
func enoughFiles(pods int) error {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return os.NewSyscallError("getrlimit", err)
	}
	if need := uint64(15*pods + 100); lim.Cur < need {
		return fmt.Errorf("%d open files are needed and %d allowed: raise the limit (ulimit -n) or use --quick", need, lim.Cur)
	}
	return nil
}
