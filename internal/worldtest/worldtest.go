// Package worldtest is what tests of whole programs have in common: a world that
// scripts/world builds, the two programs in it, and applications in its pods, which
// are the tests themselves.
//
// A World has Places: pods, nodes and the bridge between these. What a Place does
// with sockets, an application in there does. A Node is an agent and a ztunnel, each
// a Process whose log can be read.
package worldtest

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"ambient-emulator/internal/testmain"
)

// Patience is how long anybody waits for anything.
const Patience = 15 * time.Second

// Where the programs are: in the private world's own /run, which ends with it.
const (
	Agent   = "/run/bin/cni-emulator"
	Ztunnel = "/run/bin/ztunnel-emulator"
	// FastZtunnel is without the race detector, which knows 8,128 goroutines, and
	// distorts what is measured.
	FastZtunnel = "/run/bin/fast/ztunnel-emulator"
)

// testmain wants the main thread locked.
func init() { runtime.LockOSThread() }

// Main is a TestMain: testmain.Run, with so many tests at a time. They wait more than
// they work. -parallel beats it.
func Main(m *testing.M, parallel int) {
	os.Setenv("GORACE", "atexit_sleep_ms=0") // of the programs: to sleep a second is the default
	flag.Set("test.parallel", strconv.Itoa(parallel))
	testmain.Run(m)
}

// build builds the programs, with the race detector if the tests have it.
var build = sync.OnceValue(func() error {
	var race []string
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		race = []string{"-race"}
	}
	for path, flags := range map[string][]string{Agent: race, Ztunnel: race, FastZtunnel: nil} {
		name := filepath.Base(path)
		cmd := exec.Command("go", slices.Concat([]string{"build", "-o", path}, flags, []string{name + ".go"})...)
		cmd.Dir = filepath.Join(testmain.Root(), name)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go build %s.go: %w: %s", name, err, out)
		}
	}
	return nil
})

// WaitFor polls until ok, and is out of patience in the end.
func WaitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within %v", what, Patience)
		}
	}
}

// Exists tells whether there is anything at the path, such as a socket.
func Exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
