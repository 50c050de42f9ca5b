// Package netnstest makes network namespaces for tests.
package netnstest

import (
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// New returns a fresh, nameless network namespace with lo up. It is closed, and
// so freed if nobody else holds it, when the test ends.
func New(tb testing.TB) *netns.NS {
	tb.Helper()
	ns := NewLoDown(tb)
	if _, err := ns.Do(loUp); err != nil {
		tb.Fatalf("set lo up: %v", err)
	}
	return ns
}

// NewLoDown is New with lo as the kernel makes it: down.
func NewLoDown(tb testing.TB) *netns.NS {
	tb.Helper()
	ns, err := Make()
	if err != nil {
		tb.Fatalf("make a network namespace: %v", err)
	}
	tb.Cleanup(func() { ns.Close() })
	return ns
}

// Make makes a namespace that the caller closes.
func Make() (*netns.NS, error) {
	type result struct {
		ns  *netns.NS
		err error
	}
	done := make(chan result, 1)
	go func() {
		// The lock is kept: the thread that has unshared dies with the goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- result{err: os.NewSyscallError("unshare", err)}
			return
		}
		ns, err := netns.Open("/proc/thread-self/ns/net")
		done <- result{ns, err}
	}()
	r := <-done
	return r.ns, r.err
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

// loUp is `ip link set lo up` for the calling thread's namespace.
func loUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return os.NewSyscallError("ioctl SIOCSIFFLAGS", unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr))
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
