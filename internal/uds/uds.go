// Package uds makes Unix sockets that can be trusted: private from their first
// instant, never in the place of anything alive, gone when their owner is.
package uds

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxPath is the longest path that fits a sockaddr_un with its closing zero (unix(7)).
const maxPath = len(unix.RawSockaddrUnix{}.Path) - 1

// What may stand at a socket's path already. The error that wraps them names the path.
var (
	ErrInUse     = errors.New("another process listens there")
	ErrNotSocket = errors.New("something that is no socket stands there")
)

// Listener is a listening Unix socket that removes its own file, and only its
// own, when closed.
type Listener struct {
	*net.UnixListener
	path     string
	dev, ino uint64
}

// Listen listens at path; network is "unix" or "unixpacket". The file is of mode
// 0600 from the moment it exists. A stale socket, one that nobody listens on any
// more, is replaced; anything else at path is left alone and is an error. Of
// several callers, in whatever process, exactly one gets the path.
func Listen(network, path string) (*Listener, error) {
	if err := checkPath(path); err != nil {
		return nil, err
	}
	// Who looks and then replaces must be alone. The lock is on the directory:
	// it needs no file of its own, and dies with its holder.
	unlock, err := lockDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	defer unlock()

	if err := removeStale(path); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}

	// fchmod(2) of a socket before bind(2) decides the mode of the file that
	// bind makes; chmod after it would leave a moment for strangers.
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		cerr := raw.Control(func(fd uintptr) { err = os.NewSyscallError("fchmod", unix.Fchmod(int(fd), 0o600)) })
		return errors.Join(cerr, err)
	}}
	l, err := lc.Listen(context.Background(), network, path)
	if err != nil {
		return nil, err // names the path itself
	}
	ul := l.(*net.UnixListener)
	ul.SetUnlinkOnClose(false) // Close does it, with more care

	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		ul.Close()
		return nil, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return &Listener{UnixListener: ul, path: path, dev: st.Dev, ino: st.Ino}, nil
}

// Path returns the path as given to Listen.
func (l *Listener) Path() string { return l.path }

// Close removes the socket's file, unless another one stands at its path by
// now, and closes the socket.
func (l *Listener) Close() error {
	// No lock: while we listen nobody replaces us.
	var st unix.Stat_t
	var removeErr error
	if unix.Lstat(l.path, &st) == nil && st.Dev == l.dev && st.Ino == l.ino {
		removeErr = os.Remove(l.path)
	}
	return errors.Join(removeErr, l.UnixListener.Close())
}

func checkPath(path string) error {
	switch {
	case path == "":
		return errors.New("the socket's path is empty")
	case path[0] == '@':
		// Go would make an abstract socket of it, which has no file and no mode.
		return fmt.Errorf("%q is no path of a file: for a name that starts with @ write ./@", path)
	}
	if len(path) > maxPath {
		return fmt.Errorf("socket path %s has %d bytes; the kernel takes %d at most: choose a shorter one", path, len(path), maxPath)
	}
	return nil
}

// removeStale clears path if a dead socket stands there. The caller holds the
// directory's lock.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%w (%s); it is left alone: choose another path", ErrNotSocket, typeName(fi.Mode()))
	}

	// Only connect(2) can tell whether somebody listens. A living server may
	// answer in several ways; a dead one only in one.
	err = probe(path)
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return os.Remove(path)
	case err == nil, errors.Is(err, unix.EPROTOTYPE), errors.Is(err, unix.EAGAIN):
		// Connected; or of another socket kind; or its backlog is full.
		return fmt.Errorf("%w: stop it or choose another path", ErrInUse)
	}
	return fmt.Errorf("cannot tell whether the socket there is alive: %w; it is left alone: choose another path, or run as its owner", err)
}

// probe connects to path and hangs up.
func probe(path string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	return os.NewSyscallError("connect", unix.Connect(fd, &unix.SockaddrUnix{Name: path}))
}

// lockWait is how long Listen waits for another starter in the same directory.
const lockWait = 2 * time.Second

// lockDir takes flock(2) on a directory and returns what undoes it.
func lockDir(dir string) (unlock func(), err error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("there is no directory %s: make it first", dir)
		}
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	deadline := time.Now().Add(lockWait)
	for {
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { unix.Close(fd) }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			unix.Close(fd)
			return nil, fmt.Errorf("lock the directory %s: %w; try again, or use a directory of your own", dir, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func typeName(m fs.FileMode) string {
	switch {
	case m.IsRegular():
		return "a regular file"
	case m.IsDir():
		return "a directory"
	case m&fs.ModeSymlink != 0:
		return "a symbolic link"
	case m&fs.ModeNamedPipe != 0:
		return "a named pipe"
	}
	return "a device"
}
