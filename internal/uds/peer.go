package uds

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrUntrusted says that the process at the other end may not talk to us.
var ErrUntrusted = errors.New("the peer is neither root nor this user")

// Peer is who is at the other end, as the kernel recorded it at connect(2) for
// a server and at listen(2) for a client (SO_PEERCRED, unix(7)). A process or
// user of another namespace shows as PID 0 and as the overflow UID.
type Peer struct {
	PID int32
	UID uint32
}

// PeerOf asks the kernel who is at the other end of conn, and returns
// ErrUntrusted besides when that is neither root nor our own user.
func PeerOf(conn *net.UnixConn) (Peer, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return Peer{}, err
	}
	if credErr != nil {
		return Peer{}, os.NewSyscallError("getsockopt SO_PEERCRED", credErr)
	}
	p := Peer{PID: cred.Pid, UID: cred.Uid}
	if p.UID != 0 && int(p.UID) != os.Geteuid() {
		return p, fmt.Errorf("%w: it has uid %d, we have %d; run both as one user", ErrUntrusted, p.UID, os.Geteuid())
	}
	return p, nil
}

// Dial connects to path and trusts nobody but root and our own user there. The
// error says what to try. ctx bounds the whole of it; without a deadline a full
// backlog is an error at once, for callers that have their own pace.
func Dial(ctx context.Context, network, path string) (*net.UnixConn, Peer, error) {
	if err := checkPath(path); err != nil {
		return nil, Peer{}, err
	}
	conn, err := dial(ctx, network, path)
	if err != nil {
		return nil, Peer{}, fmt.Errorf("connect to %s: %w%s", path, errno(err), advice(path, err))
	}
	peer, err := PeerOf(conn)
	if err != nil {
		conn.Close()
		return nil, Peer{}, fmt.Errorf("connect to %s: %w", path, err)
	}
	return conn, peer, nil
}

// dial connects, and waits while the server's backlog is full (EAGAIN on a
// Unix socket, connect(2)).
func dial(ctx context.Context, network, path string) (*net.UnixConn, error) {
	var d net.Dialer
	var full error
	for {
		conn, err := d.DialContext(ctx, network, path)
		switch {
		case err == nil:
			return conn.(*net.UnixConn), nil
		case errors.Is(err, unix.EAGAIN):
			if _, patient := ctx.Deadline(); !patient {
				return nil, err
			}
			full = err
		case full != nil && timeout(err):
			return nil, full // says more than that the time is over
		default:
			return nil, err
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return nil, full
		}
	}
}

func timeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

// errno strips what net.OpError says about addresses; the caller names the path.
func errno(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	var sys *os.SyscallError
	if errors.As(err, &sys) {
		return sys.Err
	}
	return err
}

func isSocket(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().Type() == fs.ModeSocket
}

func advice(path string, err error) string {
	switch {
	case errors.Is(err, unix.ECONNREFUSED) && !isSocket(path):
		return "; that is no socket"
	case errors.Is(err, unix.ENOENT):
		return "; is the server started, and with this path?"
	case errors.Is(err, unix.ECONNREFUSED):
		return "; nobody listens there: start the server again, it replaces the stale socket"
	case errors.Is(err, unix.EACCES):
		return "; the socket is its owner's alone: run as that user or as root"
	case errors.Is(err, unix.EPROTOTYPE):
		return "; the server speaks another protocol (another kind of socket)"
	case errors.Is(err, unix.EAGAIN):
		return "; the server does not accept: its backlog stayed full"
	}
	return ""
}
