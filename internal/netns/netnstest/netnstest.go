// Package netnstest makes network namespaces for tests.
package netnstest

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/fresh"
)

// New returns a fresh, nameless network namespace with lo up. It is closed, and
// so freed if nobody else holds it, when the test ends.
func New(tb testing.TB) *netns.NS {
	tb.Helper()
	ns := NewLoDown(tb)
	if _, err := ns.Do(fresh.LoUp); err != nil {
		tb.Fatalf("set lo up: %v", err)
	}
	return ns
}

// NewLoDown is New with lo as the kernel makes it: down.
func NewLoDown(tb testing.TB) *netns.NS {
	tb.Helper()
	ns, err := fresh.Make()
	if err != nil {
		tb.Fatalf("make a network namespace: %v", err)
	}
	tb.Cleanup(func() { ns.Close() })
	return ns
}

// Dup returns a second descriptor of ns for a callee that takes it over.
func Dup(tb testing.TB, ns *netns.NS) *netns.NS {
	tb.Helper()
	dup, err := netns.FromFD(DupFD(tb, ns))
	if err != nil {
		tb.Fatal(err)
	}
	return dup
}

// DupFD returns a second descriptor of ns for a callee that takes it over.
func DupFD(tb testing.TB, ns *netns.NS) int {
	tb.Helper()
	fd, err := unix.FcntlInt(uintptr(ns.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		tb.Fatalf("dup: %v", err)
	}
	return fd
}

// Veth makes a veth pair: name in our own namespace, its peer in ns. The kernel
// removes both when either namespace ends.
func Veth(tb testing.TB, ns *netns.NS, name string) {
	tb.Helper()
	cmd := exec.Command("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(DupFD(tb, ns)), "netns")}
	defer cmd.ExtraFiles[0].Close()
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("ip link add: %v: %s", err, out)
	}
}
