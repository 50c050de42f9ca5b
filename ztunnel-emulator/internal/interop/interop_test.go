// Package interop tests the tunnel against peers that are not of this project:
// Debian's h2 for Python over Python's own TLS, as client and as server, and
// openssl. They speak to the whole program, which serves pods of a world that
// scripts/world builds.
//
// What the peers do, and what they want of us, is in testdata: a script each for
// peers that keep the rules (client.py, server.py) and for those that don't
// (hostile.py). The tests here are the applications, and look at what is said in
// the log and what it has cost.
package interop

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/testmain"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	os.Setenv("GORACE", "atexit_sleep_ms=0") // of the programs: to sleep a second is the default
	flag.Set("test.parallel", "4")           // they wait more than they work; -parallel beats it
	testmain.Run(m)
}

// patience is how long anybody waits for anything.
const patience = 15 * time.Second

// bin is where the programs are: in the private world's own /run, which ends with
// it.
const bin = "/run/bin"

// podsPerNode is enough for all tests here: no pod is used twice.
const podsPerNode = 24

// built builds the world and the programs once: with the race detector if the
// tests have it, and without it in bin/fast, for what a detector would distort.
var built = sync.OnceValue(func() error {
	if out, err := exec.Command(filepath.Join(testmain.Root(), "scripts", "world"), "up", fmt.Sprint("--pods=", podsPerNode)).CombinedOutput(); err != nil {
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

// pod is a pod of the world. Its name is its service account's, too.
type pod struct {
	*netns.NS
	name string
	path string
	ip   netip.Addr
}

// at is one of the pod's addresses.
func (p *pod) at(port uint16) netip.AddrPort { return netip.AddrPortFrom(p.ip, port) }

var taken struct {
	sync.Mutex
	pods [4]int // of each node, by its number
}

// newPod takes a pod of a node, 2 or 3, that nobody else has.
func newPod(t *testing.T, node int, name string) *pod {
	t.Helper()
	if err := built(); err != nil {
		t.Fatal(err)
	}
	taken.Lock()
	n := taken.pods[node]
	taken.pods[node]++
	taken.Unlock()
	if n >= podsPerNode {
		t.Fatal("no pod is left: raise podsPerNode")
	}
	n += 2 + (node-2)*podsPerNode
	p := &pod{name: name, path: fmt.Sprint("/run/netns/world-pod", n), ip: netip.AddrFrom4([4]byte{10, 0, byte(node), byte(n)})}
	var err error
	if p.NS, err = netns.Open(p.path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// waitFor polls until ok.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within %v", what, patience)
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
