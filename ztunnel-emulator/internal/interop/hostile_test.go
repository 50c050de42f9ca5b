package interop

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/worldtest"
)

// mostMemory is what hostile peers may cost at any moment, one after the other, in
// bytes: some MiB for two hundred connections or streams, four for the window of a
// stream whose application does not read; and between two rounds of the garbage
// collector a heap of that size doubles.
const mostMemory = 24 << 20

// moreMemory are the cases that may cost more, and why.
var moreMemory = map[string]int{
	// What applications don't take is kept, by decision up to hbone's MaxQueued and
	// another window of the connection.
	"apps_read_nothing": 64<<20 + 16<<20,
}

// eachBuild runs f with a ztunnel that tells data races, and with one whose memory
// says something.
func eachBuild(t *testing.T, f func(t *testing.T, fast bool)) {
	t.Parallel()
	t.Run("race", func(t *testing.T) { f(t, false) })
	t.Run("fast", func(t *testing.T) { f(t, true) })
}

// TestHostileClient: whoever breaks the rules of 15008, or wears them out, is
// stopped, costs little, and leaves nothing behind. After each case the peer itself
// sees that somebody else is served.
func TestHostileClient(t *testing.T) {
	eachBuild(t, func(t *testing.T, fast bool) {
		served, from := newPod(t, 2, "server"), newPod(t, 3, "client")
		n := newNode(t, served)
		n.useFast(fast)
		n.start(t, served)
		var silent mute
		about := map[string]any{
			"to": served.At(15008).String(), "root": n.ca.root(), "pem": n.ca.of(t, "client"),
			"echo": served.Serve(t, served.At(0), echo).At.String(), "endless": served.Serve(t, served.At(0), endless).At.String(), "mute": served.Serve(t, served.At(0), silent.serve).At.String(),
		}
		t.Cleanup(silent.free) // before who serves is waited for
		c := startPeer(t, from, "hostile.py", "client", about)
		var cases []string
		c.next(t, &cases)
		idle := costsOf(t, n.ZT)
		for _, what := range cases {
			survives(t, n.ZT, what, fast, idle, func() {
				c.tell(t, what)
				c.expect(t, "done")
				silent.free()
			})
		}
		c.isContent(t)
	})
}

// TestHostileServer: the same of who is called. After each case somebody who is
// called in its place answers.
func TestHostileServer(t *testing.T) {
	eachBuild(t, func(t *testing.T, fast bool) {
		caller, to := newPod(t, 2, "caller"), newPod(t, 3, "server")
		n := newNode(t, caller, to)
		n.useFast(fast)
		n.start(t, caller)
		s := startPeer(t, to, "hostile.py", "server", map[string]any{"root": n.ca.root(), "pem": n.ca.of(t, "server")})
		var cases []string
		s.next(t, &cases)
		idle := costsOf(t, n.ZT)
		for _, what := range cases {
			survives(t, n.ZT, what, fast, idle, func() {
				s.tell(t, what)
				c := caller.Dial(t, to.At(8080))
				// What has come may be anything; but it ends.
				if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("%s: who calls gets %v", what, err)
				}
				c.Close()
				s.expect(t, "done")
				has(t, n.ZT, idle.descriptors) // or the next would get this tunnel
				exchange(t, caller.Dial(t, to.At(8080)))
			})
		}
		s.isContent(t)
	})
}

// survives does something to the process, which was idle before the first of that
// kind: at no moment may it have much more memory than then, if that says something,
// and afterwards no more descriptors.
func survives(t *testing.T, p *worldtest.Process, what string, memory bool, idle costs, do func()) {
	t.Helper()
	watch(t, p)
	do()
	more := memoryOf(t, p, "VmHWM:") - idle.resident
	if memory && more > mostMemory+moreMemory[what] {
		t.Errorf("after %s it has %d MiB more than before the first case", what, more>>20)
	}
	has(t, p, idle.descriptors)
}

// has waits until the process has no more than n descriptors.
func has(t *testing.T, p *worldtest.Process, n int) {
	t.Helper()
	worldtest.WaitFor(t, fmt.Sprint("fall to ", n, " descriptors"), func() bool { return costsOf(t, p).descriptors <= n })
}

// endless speaks until nobody listens.
func endless(c *worldtest.Conn) {
	block := make([]byte, 1<<16)
	for {
		if _, err := c.Write(block); err != nil {
			return
		}
	}
}

// mute is an application that does not read, until it is free to leave.
type mute struct {
	mu    sync.Mutex
	leave chan struct{}
}

func (m *mute) serve(*worldtest.Conn) { <-m.left() }

func (m *mute) left() chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.leave == nil {
		m.leave = make(chan struct{})
	}
	return m.leave
}

func (m *mute) free() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.leave != nil {
		close(m.leave)
		m.leave = nil
	}
}

// costs are what a process has.
type costs struct {
	resident    int // bytes
	descriptors int
}

func costsOf(t *testing.T, p *worldtest.Process) costs {
	t.Helper()
	fds, err := os.ReadDir(proc(p, "fd"))
	must(t, err)
	return costs{memoryOf(t, p, "VmRSS:"), len(fds)}
}

func proc(p *worldtest.Process, name string) string {
	return fmt.Sprintf("/proc/%d/%s", p.Pid, name)
}

// watch forgets the most memory that the process has had; see proc(5), clear_refs.
func watch(t *testing.T, p *worldtest.Process) {
	t.Helper()
	must(t, os.WriteFile(proc(p, "clear_refs"), []byte("5"), 0))
}

// memoryOf is a line of /proc/PID/status, in bytes.
func memoryOf(t *testing.T, p *worldtest.Process, name string) int {
	t.Helper()
	status, err := os.ReadFile(proc(p, "status"))
	must(t, err)
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == name {
			n, err := strconv.Atoi(f[1])
			must(t, err)
			return n << 10
		}
	}
	t.Fatalf("no %s in /proc/PID/status", name)
	return 0
}
