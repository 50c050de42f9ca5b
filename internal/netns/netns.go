// Package netns opens, identifies and visits network namespaces.
//
// A namespace is named by ID (device and inode), never by a path or a
// descriptor number: paths are re-used, and the same namespace has another
// number in every process. Opening judges: an NS in hand is a network namespace.
//
// Do is the teleport: one locked thread goes in with setns(2), runs a short
// function there and comes back. It is the only place of this project that
// calls setns. The sockets the function makes stay in the namespace for good;
// the process never moves. A program that uses Do must keep its main thread
// out of it: runtime.LockOSThread in an init function (see ErrMainThread).
package netns

import (
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// ID identifies a network namespace while somebody holds it open. Once it is
// freed the kernel may give the same inode to the next one, within a second.
type ID struct {
	Dev uint64 // the device of nsfs, the file system that all namespaces live in
	Ino uint64 // what `ip netns identify`, `lsns` and readlink(2) call the namespace
}

// String prints the id as the kernel does in /proc/PID/ns/net.
func (id ID) String() string { return "net:[" + strconv.FormatUint(id.Ino, 10) + "]" }

// NS is an open network namespace. It owns one descriptor, and that alone keeps
// the namespace alive: close it, or the kernel can't free the pod's namespace.
type NS struct {
	fd int
	id ID
}

// Open opens the namespace at path, for example /var/run/netns/ns2 or
// /proc/1234/ns/net, and judges it. The caller owns the result.
func Open(path string) (*NS, error) {
	// O_NONBLOCK because the path is somebody else's: open(2) of a FIFO would
	// wait for a writer for ever.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	ns, err := FromFD(fd)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return ns, nil
}

// FromFD judges a descriptor that came from anywhere, and takes it over: the
// result owns it, and on error it has been closed.
func FromFD(fd int) (*NS, error) {
	id, err := Judge(fd)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &NS{fd: fd, id: id}, nil
}

// FD returns the descriptor, which stays n's.
func (n *NS) FD() int { return n.fd }

// ID returns the namespace's identity.
func (n *NS) ID() ID { return n.id }

// Close gives the descriptor back. Sockets that were made inside keep the
// namespace alive on their own.
func (n *NS) Close() error {
	fd := n.fd
	n.fd = -1
	return os.NewSyscallError("close", unix.Close(fd))
}

// Home returns the process's own network namespace, where every thread is when
// it is not visiting. It is opened once and lives as long as the process; do
// not close it.
var Home = sync.OnceValues(func() (*NS, error) {
	// The group leader's namespace is the process's: the main thread never
	// teleports. /proc/self asks about the leader, /proc/thread-self about us.
	ns, err := Open("/proc/self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open own network namespace: %w; is /proc mounted?", err)
	}
	return ns, nil
})
