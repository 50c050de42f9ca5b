// Package capture tests pods whose traffic goes through ztunnel without their
// knowing: whole processes in a world that scripts/world builds, with the tests
// themselves as the applications.
//
// There is one world with many pods. A test takes pods of its own, and starts an
// agent and a ztunnel of its own for them; so most tests run at the same time.
package capture

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

// podsPerNode is enough for all tests here: no pod is used twice.
const podsPerNode = 100

// bin is where the programs are: in the private world's own /run, which ends with
// it.
const bin = "/run/bin"

// built builds the world and the programs once: with the race detector if the
// tests have it, and without it in bin/fast, for what is too much for a detector.
var built = sync.OnceValue(func() error {
	if out, err := exec.Command(filepath.Join(testmain.Root(), "scripts", "world"), "up", "--ipv6", fmt.Sprint("--pods=", podsPerNode)).CombinedOutput(); err != nil {
		return fmt.Errorf("scripts/world up: %w: %s", err, out)
	}
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

// place is a namespace of the world: a pod, a node or the bridge.
type place struct {
	*netns.NS
	name     string // pod2
	ip4, ip6 netip.Addr
}

// ip is the place's address of one family.
func (p *place) ip(six bool) netip.Addr {
	if six {
		return p.ip6
	}
	return p.ip4
}

func (p *place) path() string { return "/run/netns/world-" + p.name }

// run runs a command in the place, which must go well, and returns its output.
func (p *place) run(t *testing.T, command string, args ...string) string {
	t.Helper()
	out, err := exec.Command("ip", append([]string{"netns", "exec", "world-" + p.name, command}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("in %s: %s %s: %v: %s", p.name, command, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// open opens a place of the world until the end of the test.
func open(t *testing.T, name string, ip4, ip6 string) *place {
	t.Helper()
	if err := built(); err != nil {
		t.Fatal(err)
	}
	p := &place{name: name, ip4: netip.MustParseAddr(ip4), ip6: netip.MustParseAddr(ip6)}
	var err error
	if p.NS, err = netns.Open(p.path()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

var taken struct {
	sync.Mutex
	pods [4]int // of each node, by its number
}

// pod takes a pod of a node, 2 or 3, that nobody else has.
func pod(t *testing.T, node int) *place {
	t.Helper()
	taken.Lock()
	n := taken.pods[node]
	taken.pods[node]++
	taken.Unlock()
	if n == podsPerNode {
		t.Fatal("no pod is left: raise podsPerNode")
	}
	n += 2 + (node-2)*podsPerNode
	return open(t, fmt.Sprint("pod", n), fmt.Sprintf("10.0.%d.%d", node, n), fmt.Sprintf("fd00:10:0:%d::%d", node, n))
}

// bridge is the place outside of all nodes.
func bridge(t *testing.T) *place {
	t.Helper()
	return open(t, "bridge", "172.172.0.1", "fd00:172:172::1")
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

// forms are the two forms of rules.
var forms = []string{"redirect", "tproxy"}

// family names a family in the name of a test.
func family(six bool) string {
	if six {
		return "IPv6"
	}
	return "IPv4"
}

// eachWay runs f for both forms of rules, with IPv4 and IPv6.
func eachWay(t *testing.T, f func(t *testing.T, form string, six bool)) {
	for _, form := range forms {
		for _, six := range []bool{false, true} {
			t.Run(form+"/"+family(six), func(t *testing.T) {
				t.Parallel()
				f(t, form, six)
			})
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
