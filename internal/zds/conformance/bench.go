package conformance

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// How long things may take.
const (
	answerWithin = 5 * time.Second        // the agent's own deadline for an ack
	soon         = 3 * time.Second        // what happens at once, on a busy machine
	silence      = 400 * time.Millisecond // long enough to have said something wrong
	redialWithin = 20 * time.Second       // ztunnel's longest back-off is 15 s
	retryAfter   = 5 * time.Second        // ztunnel's timer for starts that failed
)

// bench is what the scenes of both halves share: a clock, pods, the process
// under test, and a list of what to undo when the scene is over.
type bench struct {
	ctx  context.Context
	o    Options
	proc *process // nil when somebody else runs the half under test

	absent error // there is nobody to be tested

	id     string   // of the scene
	pods   int      // made in the scene
	conns  []func() // end the connections of the scene
	undo   []func()
	note   string // what a scene wants to tell though all is well
	prefix string // of all uids of this run
}

func newBench(ctx context.Context, o Options) bench {
	if o.Wait == 0 {
		o.Wait = 30 * time.Second
	}
	return bench{ctx: ctx, o: o, prefix: fmt.Sprintf("c%x", time.Now().UnixMilli()&0xffffff)}
}

func (b *bench) say(format string, args ...any) {
	if b.o.Progress != nil {
		fmt.Fprintf(b.o.Progress, format+"\n", args...)
	}
}

func (b *bench) broken(format string, args ...any) {
	panic(verdict{Broken, oneLine(fmt.Sprintf(format, args...))})
}

func (b *bench) notTried(format string, args ...any) {
	panic(verdict{NotTried, oneLine(fmt.Sprintf(format, args...))})
}

// later registers what undoes something when the scene is over, last first.
func (b *bench) later(f func()) { b.undo = append(b.undo, f) }

// clear ends the scene: connections first, so that nobody waits for an answer
// while the rest is undone.
func (b *bench) clear() {
	for _, f := range b.conns {
		f()
	}
	b.conns = nil
	for _, f := range slices.Backward(b.undo) {
		f()
	}
	b.undo = nil
}

// wait lets time pass, and says so.
func (b *bench) wait(d time.Duration, why string) {
	if d >= time.Second {
		b.say("  waiting %v: %s", d.Round(100*time.Millisecond), why)
	}
	select {
	case <-time.After(d):
	case <-b.ctx.Done():
		panic(verdict{NotTried, "interrupted"})
	}
}

// until asks until it is so, and tells whether that came true in time.
func (b *bench) until(within time.Duration, so func() bool) bool {
	for deadline := time.Now().Add(within); !so(); b.wait(5*time.Millisecond, "") {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// watch makes the reads of a connection end when the run is interrupted.
func (b *bench) watch(conn *net.UnixConn) (stop func() bool) {
	return context.AfterFunc(b.ctx, func() { conn.Close() })
}

// descriptors counts those of a process that refer to a namespace.
func (b *bench) descriptors(pid int, id netns.ID) int {
	n := 0
	for _, target := range b.table(pid) {
		if target == id.String() {
			n++
		}
	}
	return n
}

// table lists what the descriptors of a process refer to.
func (b *bench) table(pid int) []string {
	if pid == 0 {
		b.notTried("the peer's process is in another PID namespace, so its descriptors can't be counted")
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	names, err := os.ReadDir(dir)
	if err != nil {
		b.notTried("its descriptors can't be counted: %v", err)
	}
	var targets []string
	for _, name := range names {
		if target, err := os.Readlink(filepath.Join(dir, name.Name())); err == nil {
			targets = append(targets, target)
		}
	}
	return targets
}

// letGo makes sure that a process comes to hold no more than n descriptors of a namespace.
func (b *bench) letGo(pid int, id netns.ID, n int, when string) {
	if !b.until(soon, func() bool { return b.descriptors(pid, id) <= n }) {
		b.broken("%s: process %d holds %d descriptors of %v, not %d", when, pid, b.descriptors(pid, id), id, n)
	}
}

// gone tells whether a process has ended, be it our child or not.
func gone(pid int) bool { return unix.Kill(pid, 0) == unix.ESRCH }
