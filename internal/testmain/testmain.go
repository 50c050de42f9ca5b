// Package testmain is the TestMain of every package that deals in descriptors
// and namespaces: it runs the tests in a private world and fails the run when
// one of them leaks a descriptor or leaves a thread in a pod.
package testmain

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"ambient-emulator/internal/netns"
)

// Run runs the tests and returns only by exiting. The caller locks the main
// thread in an init function of its own: no teleport may use it.
func Run(m *testing.M) {
	EnterPrivateWorld()

	openOnce()
	before := Descriptors()
	code := m.Run()
	if code == 0 {
		// What a finished test lets go of may take a moment: a runtime thread,
		// a connection's last goroutine.
		if leaked := settle(func() []string { return minus(Descriptors(), before) }); len(leaked) > 0 {
			fmt.Fprintf(os.Stderr, "testmain: leaked descriptors:\n  %s\n", strings.Join(leaked, "\n  "))
			code = 1
		}
		if astray := settle(ThreadsAstray); len(astray) > 0 {
			fmt.Fprintf(os.Stderr, "testmain: threads in another network namespace:\n  %s\n", strings.Join(astray, "\n  "))
			code = 1
		}
	}
	os.Exit(code)
}

// EnterPrivateWorld runs this test binary again through scripts/private unless
// it is in a private world already, so that a plain `go test` harms nothing.
func EnterPrivateWorld() {
	if os.Getenv("PRIVATE_WORLD") != "" {
		return
	}
	script := filepath.Join(Root(), "scripts", "private")
	err := syscall.Exec(script, append([]string{script}, os.Args...), os.Environ())
	fmt.Fprintf(os.Stderr, "testmain: exec %s: %v\n", script, err)
	os.Exit(1)
}

// RealRoot tells whether we may become other users: root, and not only of a user
// namespace that knows nobody else. A test that needs it skips otherwise; CI is
// root and fails on a skip.
func RealRoot() bool {
	m, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		panic(err)
	}
	f := strings.Fields(string(m))
	return os.Getuid() == 0 && len(f) == 3 && f[2] != "1"
}

// Root returns the top folder of the source tree.
func Root() string {
	dir, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == "/" {
			panic("testmain: no go.mod above the working directory")
		}
		dir = filepath.Dir(dir)
	}
}

// openOnce opens what is open for as long as the process, so that it does not
// count as a leak: the home namespace, and the runtime's poller, which the first
// pipe starts.
func openOnce() {
	if _, err := netns.Home(); err != nil {
		panic(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		panic(err)
	}
	r.Close()
	w.Close()
}

// Descriptors lists what this process has open, as "number -> target".
func Descriptors() []string {
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		panic(err)
	}
	var fds []string
	for _, name := range names {
		target, err := os.Readlink("/proc/self/fd/" + name)
		if err != nil || name == fmt.Sprint(dir.Fd()) {
			continue
		}
		fds = append(fds, name+" -> "+target)
	}
	slices.Sort(fds)
	return fds
}

// ThreadsAstray lists the threads of this process that are in another network
// namespace than the process.
func ThreadsAstray() []string {
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		panic(err)
	}
	links, _ := filepath.Glob("/proc/self/task/*/ns/net")
	var astray []string
	for _, link := range links {
		if ns, err := os.Readlink(link); err == nil && ns != home {
			astray = append(astray, link+" -> "+ns)
		}
	}
	return astray
}

// settle asks until the list is empty, for five seconds, and returns the last.
func settle(list func() []string) []string {
	deadline := time.Now().Add(5 * time.Second)
	for {
		l := list()
		if len(l) == 0 || time.Now().After(deadline) {
			return l
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func minus(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
}
