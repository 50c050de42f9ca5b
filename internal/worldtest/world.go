package worldtest

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/testmain"
)

// World is a world of scripts/world with two nodes, whose numbers are 2 and 3.
type World struct {
	name string
	pods int // of each node

	mu    sync.Mutex
	taken [4]int // pods of each node
}

var worlds atomic.Int32

// Up builds the programs, once, and a world with so many pods on each node; flags are
// more of scripts/world's. It ends with the private world of all tests.
func Up(t *testing.T, pods int, flags ...string) *World {
	t.Helper()
	// First of all: it may take longer than anybody has patience.
	if err := build(); err != nil {
		t.Fatal(err)
	}
	w := &World{name: fmt.Sprint("world", worlds.Add(1)), pods: pods}
	cmd := exec.Command(filepath.Join(testmain.Root(), "scripts", "world"), append([]string{"up", fmt.Sprint("--pods=", pods)}, flags...)...)
	cmd.Env = append(os.Environ(), "WORLD="+w.name)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("scripts/world up: %v: %s", err, out)
	}
	return w
}

// Shared is Up for tests that share a world. When one of them comes again (-count),
// all that came before are over, and there is another world.
func Shared(pods int, flags ...string) func(*testing.T) *World {
	var mu sync.Mutex
	var world *World
	var seen map[string]*testing.T
	return func(t *testing.T) *World {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if before := seen[t.Name()]; world == nil || before != nil && before != t {
			world, seen = Up(t, pods, flags...), map[string]*testing.T{}
		}
		seen[t.Name()] = t
		return world
	}
}

// Place is a namespace of a world: a pod, a node or the bridge.
type Place struct {
	*netns.NS
	Name     string // pod2, or what a test calls it
	Path     string
	IP4, IP6 netip.Addr // of a pod

	world *World
}

// Open opens a place, such as node2, until the end of the test.
func (w *World) Open(t *testing.T, name string) *Place {
	t.Helper()
	p := &Place{Name: name, Path: "/run/netns/" + w.name + "-" + name, world: w}
	var err error
	if p.NS, err = netns.Open(p.Path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// Pod takes a pod of a node that nobody else has.
func (w *World) Pod(t *testing.T, node int) *Place {
	t.Helper()
	w.mu.Lock()
	n := w.taken[node]
	w.taken[node]++
	w.mu.Unlock()
	if n >= w.pods {
		t.Fatal("no pod is left: build a world with more")
	}
	n += 2 + (node-2)*w.pods
	p := w.Open(t, fmt.Sprint("pod", n))
	p.IP4 = netip.AddrFrom4([4]byte{10, 0, byte(node), byte(n)})
	p.IP6 = netip.MustParseAddr(fmt.Sprintf("fd00:10:0:%d::%d", node, n))
	return p
}

// At is a pod's address with a port.
func (p *Place) At(port uint16) netip.AddrPort { return netip.AddrPortFrom(p.IP4, port) }

// IP is a pod's address of one family.
func (p *Place) IP(six bool) netip.Addr {
	if six {
		return p.IP6
	}
	return p.IP4
}

// Run runs a command in the place, which must go well, and returns its output.
func (p *Place) Run(t *testing.T, command string, args ...string) string {
	t.Helper()
	out, err := Command(p.NS, command, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("in %s: %s %s: %v: %s", p.Name, command, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Freed removes the name and our own descriptor of a pod, and waits until the kernel
// has freed it: the other end of its veth goes then.
func (p *Place) Freed(t *testing.T) {
	t.Helper()
	ip := p.IP4.As4()
	node, veth := p.world.Open(t, fmt.Sprint("node", ip[2])), fmt.Sprint("veth", ip[3])
	node.Run(t, "ip", "link", "show", veth)
	node.Run(t, "ip", "netns", "delete", filepath.Base(p.Path))
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	WaitFor(t, "end of the namespace of "+p.Name, func() bool {
		return !strings.Contains(node.Run(t, "ip", "-o", "link"), " "+veth+"@")
	})
}
