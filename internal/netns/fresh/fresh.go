// Package fresh makes network namespaces: for tests, for benchmarks, and for
// whoever plays a pod. The two programs are handed theirs.
package fresh

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// Make makes a nameless network namespace, with lo down as the kernel makes it.
// The caller closes it, and then the kernel frees it if nobody else holds it.
func Make() (*netns.NS, error) {
	done := make(chan made, 1)
	go unshare(done)
	m := <-done
	return m.ns, m.err
}

type made struct {
	ns  *netns.NS
	err error
}

// unshare makes it. The lock is kept: the thread that has unshared dies with the
// goroutine.
func unshare(done chan<- made) {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		done <- made{err: os.NewSyscallError("unshare", err)}
		return
	}
	ns, err := netns.Open("/proc/thread-self/ns/net")
	done <- made{ns, err}
}

// LoUp is `ip link set lo up` for the calling thread's namespace.
func LoUp() error {
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
