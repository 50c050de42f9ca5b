// Package fdpass sends and receives one message with at most one descriptor
// over a Unix socket of any kind (unix(7), SCM_RIGHTS).
//
// The sender names a descriptor of its own; the kernel takes a reference to the
// open file behind it and, at recvmsg(2), installs that in the receiver's table
// under a number of the receiver's. So a pod's namespace crosses from one
// process to the other with no path and no name, and stays open on the way.
package fdpass

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// NoFD stands for the descriptor of a message that carries none.
const NoFD = -1

// What can be wrong with a message. After any of them no descriptor of the
// message is left open.
var (
	ErrMany      = errors.New("more than one descriptor in the message")
	ErrTruncated = errors.New("message longer than the buffer")
	// ErrTableFull: the peer did send a descriptor, and the kernel had nowhere
	// to put it.
	ErrTableFull = errors.New("the receiver's descriptor table is full")
)

// Send sends b as one message, with fd unless that is NoFD. fd stays the
// caller's, which may close it as soon as Send has returned. b may not be empty:
// a stream carries no descriptor without a byte, and an empty packet means EOF.
func Send(conn *net.UnixConn, b []byte, fd int) error {
	var oob []byte
	if fd != NoFD {
		oob = unix.UnixRights(fd)
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var n int
	var sendErr error
	err = raw.Write(func(sock uintptr) bool {
		n, sendErr = unix.SendmsgN(int(sock), b, oob, nil, unix.MSG_NOSIGNAL)
		return sendErr != unix.EAGAIN
	})
	switch {
	case err != nil:
		return err
	case sendErr != nil:
		return os.NewSyscallError("sendmsg", sendErr)
	case n < len(b):
		return io.ErrShortWrite
	}
	return nil
}

// Recv receives one message of at most len(buf) bytes. The descriptor that came
// with it, or NoFD, is the caller's. It returns io.EOF when the peer is done.
func Recv(conn *net.UnixConn, buf []byte) (n, fd int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, NoFD, err
	}
	// Room for one. Control messages are padded to eight bytes, so on a 64-bit
	// kernel two descriptors fit, and no flag tells (cmsg(3)).
	oob := make([]byte, unix.CmsgSpace(4))
	var oobn, flags int
	var recvErr error
	err = raw.Read(func(sock uintptr) bool {
		// Close-on-exec from the first instant: a fork in another goroutine
		// must not inherit a pod.
		n, oobn, flags, _, recvErr = unix.Recvmsg(int(sock), buf, oob, unix.MSG_CMSG_CLOEXEC)
		return recvErr != unix.EAGAIN
	})
	if err != nil {
		return 0, NoFD, err
	}
	if recvErr != nil {
		return 0, NoFD, os.NewSyscallError("recvmsg", recvErr)
	}

	// The descriptors are ours from now on: take them out before judging
	// anything else, or an error below would leak them.
	fds, err := descriptors(oob[:oobn])
	if err == nil {
		err = verdict(n, len(fds), flags)
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return 0, NoFD, err
	}
	if len(fds) == 0 {
		return n, NoFD, nil
	}
	return n, fds[0], nil
}

// descriptors returns every descriptor in the control data, whatever stands
// around it. With an error it returns those found until then.
func descriptors(oob []byte) ([]int, error) {
	var fds []int
	for len(oob) >= unix.SizeofCmsghdr {
		hdr, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return fds, fmt.Errorf("parse control message: %w", err)
		}
		oob = rest
		// Whole numbers only. The kernel sends nothing else, but the library would panic.
		msg := unix.SocketControlMessage{Header: hdr, Data: data[:len(data)&^3]}
		if hdr.Level != unix.SOL_SOCKET || hdr.Type != unix.SCM_RIGHTS {
			continue // credentials, say: harmless
		}
		got, err := unix.ParseUnixRights(&msg)
		if err != nil {
			return fds, fmt.Errorf("parse SCM_RIGHTS: %w", err)
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

// verdict judges a message of n bytes and fds descriptors by the flags that
// recvmsg returned.
func verdict(n, fds, flags int) error {
	switch {
	case flags&unix.MSG_CTRUNC != 0 && fds == 0:
		// There was room in the buffer, so it was the table that had none.
		return ErrTableFull
	case flags&unix.MSG_CTRUNC != 0 || fds > 1:
		return ErrMany
	case flags&unix.MSG_TRUNC != 0:
		return ErrTruncated
	case n == 0:
		return io.EOF
	}
	return nil
}
