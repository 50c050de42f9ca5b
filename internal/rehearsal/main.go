// Command rehearsal rehearses what an operator fears: an upgrade of ztunnel
// under traffic, and its sudden death. It runs the real programs on pods of its
// own, with a client in every pod, and reports what the clients saw.
//
//	rehearsal [-pods N] [-cni PATH] [-ztunnel PATH] upgrade|crash
//
// It makes network namespaces with ip-netns(8): run it in a private world
// (scripts/private), as scripts/rehearsal does.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

func init() { runtime.LockOSThread() }

func main() {
	pods := flag.Int("pods", 100, "how many pods")
	cni := flag.String("cni", "cni-emulator/cni-emulator", "the agent's program")
	ztunnel := flag.String("ztunnel", "ztunnel-emulator/ztunnel-emulator", "ztunnel's program")
	flag.Parse()
	run := map[string]func(context.Context, *world) (report, error){"upgrade": upgrade, "crash": crash}[flag.Arg(0)]
	if run == nil || flag.NArg() != 1 || *pods < 1 {
		fmt.Fprintln(os.Stderr, "rehearsal: say upgrade or crash")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()

	done := make(chan int, 1)
	go func() { done <- rehearse(ctx, *pods, *cni, *ztunnel, run) }() // off the main thread
	os.Exit(<-done)
}

func rehearse(ctx context.Context, pods int, cni, ztunnel string, run func(context.Context, *world) (report, error)) int {
	w, err := newWorld(ctx, pods, cni, ztunnel, os.Stderr)
	if err == nil {
		var r report
		if r, err = run(ctx, w); err == nil {
			fmt.Print(r)
			if r.failed() {
				err = fmt.Errorf("connections were lost")
			}
		}
	}
	w.close()
	if err != nil {
		fmt.Fprintln(os.Stderr, "rehearsal:", err)
		return 1
	}
	return 0
}

// report is what the clients saw, and how long things took.
type report struct {
	pods            int
	before, served  int64 // connections answered: until the event, and in all
	refused, reset  int64
	other           int64
	mayLose         bool // a crash loses connections; an upgrade may not
	steps           []step
	slowest, median time.Duration
}

type step struct {
	what string
	took time.Duration
}

func (r report) failed() bool { return !r.mayLose && r.refused+r.reset+r.other > 0 }

// String is the report for a person.
func (r report) String() string {
	s := fmt.Sprintf("pods                       %d, a client in each\n", r.pods)
	s += fmt.Sprintf("connections answered       %d (%d before the event)\n", r.served, r.before)
	s += fmt.Sprintf("connections lost           %d refused, %d reset, %d otherwise\n", r.refused, r.reset, r.other)
	s += fmt.Sprintf("a connection takes         %v (median), %v (slowest)\n", r.median.Round(time.Microsecond), r.slowest.Round(time.Microsecond))
	for _, st := range r.steps {
		s += fmt.Sprintf("%-26s %v\n", st.what, st.took.Round(100*time.Microsecond))
	}
	return s
}

// begin brings ztunnel A up with all pods, and clients that have been served in
// each. The caller stops the clients.
func begin(ctx context.Context, w *world) (*ztunnel, *clients, error) {
	a, err := w.startZtunnel(ctx, "node-a")
	if err != nil {
		return nil, nil, err
	}
	if err := w.addPods(ctx); err != nil {
		return nil, nil, err
	}
	if _, err := w.waitReady(ctx, a); err != nil {
		return nil, nil, err
	}
	c := startClients(w.pods)
	if err := c.waitFor(ctx, 2); err != nil {
		c.stop()
		return nil, nil, err
	}
	return a, c, nil
}

// upgrade: ztunnel A serves all pods, ztunnel B connects and gets them all, A
// drains and leaves. Not one connection may be lost.
func upgrade(ctx context.Context, w *world) (report, error) {
	r := report{pods: len(w.pods)}
	a, c, err := begin(ctx, w)
	if err != nil {
		return r, err
	}
	defer c.stop()

	r.before = c.served.Load()
	b, err := w.startZtunnel(ctx, "node-b")
	if err != nil {
		return r, err
	}
	took, err := w.waitReady(ctx, b)
	if err != nil {
		return r, err
	}
	r.steps = append(r.steps, step{"B started to ready", took})
	if err := c.waitFor(ctx, 2); err != nil { // both serve
		return r, err
	}
	left := time.Now()
	if err := a.end(unix.SIGTERM); err != nil {
		return r, fmt.Errorf("ztunnel A: %w", err)
	}
	r.steps = append(r.steps, step{"A told to leave to gone", time.Since(left)})
	if err := c.waitFor(ctx, 3); err != nil { // B alone
		return r, err
	}
	c.stop()
	c.report(&r)
	return r, nil
}

// crash: ztunnel is killed and started again. What matters is how soon all pods
// are served.
func crash(ctx context.Context, w *world) (report, error) {
	r := report{pods: len(w.pods), mayLose: true}
	a, c, err := begin(ctx, w)
	if err != nil {
		return r, err
	}
	defer c.stop()
	r.before = c.served.Load()

	killed := time.Now()
	a.end(unix.SIGKILL)
	again, err := w.startZtunnel(ctx, "node-a")
	if err != nil {
		return r, err
	}
	if err := c.waitFor(ctx, 1); err != nil {
		return r, err
	}
	r.steps = append(r.steps, step{"killed to all served again", time.Since(killed)})
	if _, err := w.waitReady(ctx, again); err != nil {
		return r, err
	}
	c.stop()
	c.report(&r)
	return r, nil
}
