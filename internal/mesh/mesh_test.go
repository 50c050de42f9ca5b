// Package mesh tests pods that talk through the tunnel: whole programs, on the
// nodes and with the bytes of the real ztunnel's own tests, whose cases bear their
// names here (reference/localconfig.md, section 4.1: see namespaced_test.go).
//
// Each test has a world of its own, which scripts/world builds, so they run at the
// same time. The tests themselves are the applications, and who speaks HBONE
// without being ztunnel has code of his own, not ours: hbone_test.go.
package mesh

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/testmain"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	os.Setenv("GORACE", "atexit_sleep_ms=0") // of the programs: to sleep a second is the default
	flag.Set("test.parallel", "8")           // they wait more than they work; -parallel beats it
	testmain.Run(m)
}

// bin is where the programs are: in the private world's own /run, which ends with
// it.
const bin = "/run/bin"

// built builds the programs once: with the race detector if the tests have it, and
// without it in bin/fast, for what is too much for a detector.
var built = sync.OnceValue(func() error {
	for _, name := range []string{"cni-emulator", "ztunnel-emulator"} {
		args := []string{"build", "-o", filepath.Join(bin, name)}
		if raceEnabled {
			args = append(args, "-race")
		}
		if err := goBuild(name, args...); err != nil {
			return err
		}
	}
	return goBuild("ztunnel-emulator", "build", "-o", filepath.Join(bin, "fast", "ztunnel-emulator"))
})

func goBuild(name string, args ...string) error {
	cmd := exec.Command("go", append(args, name+".go")...)
	cmd.Dir = filepath.Join(testmain.Root(), name)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s.go: %w: %s", name, err, out)
	}
	return nil
}

// The nodes of each world, and what they are called in the configuration.
const (
	local  = 2
	remote = 3
)

var nodeNames = map[int]string{local: "node", remote: "remote-node"}

// podsPerNode is how many pods a node has at most, its ztunnel included.
const podsPerNode = 4

var worlds atomic.Int32

// mesh is a world, and what is configured in it.
type mesh struct {
	world string
	dir   string // of the sockets and the configuration
	nodes map[int]*node
	taken map[int]int // pods of each node
	pods  []*pod

	services, policies string // YAML, of the configuration
}

// newMesh builds a world. It ends with the private world of all tests.
func newMesh(t *testing.T) *mesh {
	t.Helper()
	t.Parallel()
	if err := built(); err != nil {
		t.Fatal(err)
	}
	m := &mesh{world: fmt.Sprint("mesh", worlds.Add(1)), nodes: map[int]*node{}, taken: map[int]int{}}
	m.dir = "/run/" + m.world // short: a test's own folder may be too long for a socket's path
	if err := os.Mkdir(m.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(testmain.Root(), "scripts", "world"), "up", fmt.Sprint("--pods=", podsPerNode))
	cmd.Env = append(os.Environ(), "WORLD="+m.world)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("scripts/world up: %v: %s", err, out)
	}
	return m
}

// place is a namespace of the world.
type place struct {
	*netns.NS
	path string
}

// open opens a place until the end of the test.
func (m *mesh) open(t *testing.T, name string) place {
	t.Helper()
	p := place{path: "/run/netns/" + m.world + "-" + name}
	var err error
	if p.NS, err = netns.Open(p.path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// run runs a command in the place, which must go well, and returns its output.
func (p place) run(t *testing.T, command string, args ...string) string {
	t.Helper()
	out, err := exec.Command("ip", append([]string{"netns", "exec", filepath.Base(p.path), command}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("in %s: %s %s: %v: %s", p.path, command, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// pod is a pod and what the configuration says of it.
type pod struct {
	place
	node        *node
	name        string
	account     string // its service account; by default its name
	ip          netip.Addr
	captured    bool
	hbone       bool // speaks HBONE itself
	plain       bool // takes no tunnels, whoever serves it
	trustDomain string
	services    string   // YAML: what it serves
	more        []string // YAML: further keys
}

// at is one of the pod's addresses.
func (p *pod) at(port uint16) netip.AddrPort { return netip.AddrPortFrom(p.ip, port) }

// identity is what the pod's certificate says.
func (p *pod) identity() string {
	return "spiffe://" + p.trustDomain + "/ns/default/sa/" + p.account
}

func (p *pod) uid() string { return "cluster1//v1/Pod/default/" + p.name }

// uncaptured takes a pod of a node that has nothing to do with ztunnel.
func (m *mesh) uncaptured(t *testing.T, name string, on int) *pod {
	t.Helper()
	if m.taken[on] == podsPerNode {
		t.Fatal("no pod is left: raise podsPerNode")
	}
	id := 2 + (on-2)*podsPerNode + m.taken[on]
	m.taken[on]++
	p := &pod{
		place: m.open(t, fmt.Sprint("pod", id)), name: name, account: name, ip: netip.AddrFrom4([4]byte{10, 0, byte(on), byte(id)}),
		trustDomain: "cluster.local", services: "{}",
	}
	m.pods = append(m.pods, p)
	return p
}

// pod takes a pod of a node whose traffic goes through ztunnel. With the first, the
// node gets a pod for ztunnel itself.
func (m *mesh) pod(t *testing.T, name string, on int) *pod {
	t.Helper()
	n := m.nodes[on]
	if n == nil {
		n = &node{mesh: m, number: on, program: filepath.Join(bin, "ztunnel-emulator")}
		n.env = []string{"CONNECTION_TERMINATION_DEADLINE=50ms"}
		m.nodes[on] = n
		n.home = m.uncaptured(t, "ztunnel-"+nodeNames[on], on)
		n.home.node = n
	}
	p := m.uncaptured(t, name, on)
	p.node, p.captured = n, true
	return p
}

// freed removes the name and our own descriptor of a pod, and waits until the kernel
// has freed its namespace: the other end of its veth goes then.
func (m *mesh) freed(t *testing.T, p *pod) {
	t.Helper()
	on := m.open(t, fmt.Sprint("node", p.ip.As4()[2]))
	veth := fmt.Sprint("veth", p.ip.As4()[3])
	on.run(t, "ip", "link", "show", veth)
	on.run(t, "ip", "netns", "delete", filepath.Base(p.path))
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "end of the namespace of "+p.name, func() bool {
		return !strings.Contains(on.run(t, "ip", "-o", "link"), " "+veth+"@")
	})
}

// waitFor polls until ok, ten seconds at most.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within 10 s", what)
		}
	}
}
