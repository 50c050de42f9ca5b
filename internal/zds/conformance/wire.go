package conformance

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/zds"
)

// packet is what recvmsg(2) gave, before any judgement. The descriptors are the
// receiver's.
type packet struct {
	b     []byte
	fds   []int
	flags int
}

// close gives the descriptors back.
func (p *packet) close() {
	for _, fd := range p.fds {
		unix.Close(fd)
	}
	p.fds = nil
}

// String prints the bytes, and how many descriptors came along.
func (p packet) String() string {
	b, more := p.b, ""
	if len(b) > 48 {
		b, more = b[:48], fmt.Sprintf(" … %d bytes", len(p.b))
	}
	s := fmt.Sprintf("[% x%s]", b, more)
	if len(p.fds) > 0 {
		s += fmt.Sprintf(" with %d descriptors", len(p.fds))
	}
	return s
}

// sendPacket sends any bytes, none included, with any descriptors, which stay
// the caller's: what a well-behaved library would not let through.
func sendPacket(conn *net.UnixConn, b []byte, fds ...int) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	var sendErr error
	err = raw.Write(func(sock uintptr) bool {
		_, sendErr = unix.SendmsgN(int(sock), b, oob, nil, unix.MSG_NOSIGNAL)
		return sendErr != unix.EAGAIN
	})
	return errors.Join(err, os.NewSyscallError("sendmsg", sendErr))
}

// recvPacket receives one packet whole, with all its descriptors, until the
// deadline of the connection. io.EOF: the peer has ended the connection.
func recvPacket(conn *net.UnixConn) (packet, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return packet{}, err
	}
	// Far more than anyone may send, so that excess is seen and not cut.
	buf, oob := make([]byte, 64*zds.MaxPacket), make([]byte, unix.CmsgSpace(4*253))
	var n, oobn, flags int
	var recvErr error
	err = raw.Read(func(sock uintptr) bool {
		n, oobn, flags, _, recvErr = unix.Recvmsg(int(sock), buf, oob, unix.MSG_CMSG_CLOEXEC)
		return recvErr != unix.EAGAIN
	})
	if err != nil {
		return packet{}, err
	}
	if recvErr == unix.ECONNRESET {
		// The peer closed with something of ours unread (unix(7)): gone all the same.
		return packet{}, io.EOF
	}
	if recvErr != nil {
		return packet{}, os.NewSyscallError("recvmsg", recvErr)
	}
	p := packet{b: buf[:n], flags: flags}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	for _, m := range msgs {
		if fds, err := unix.ParseUnixRights(&m); err == nil {
			p.fds = append(p.fds, fds...)
		}
	}
	if err == nil && n == 0 {
		err = io.EOF // an empty packet is an end too
	}
	if err != nil {
		p.close()
		return packet{}, err
	}
	return p, nil
}

// recvWithin is recvPacket with a deadline.
func (b *bench) recvWithin(conn *net.UnixConn, d time.Duration) (packet, error) {
	conn.SetReadDeadline(time.Now().Add(d))
	p, err := recvPacket(conn)
	if b.ctx.Err() != nil {
		p.close()
		panic(verdict{NotTried, "interrupted"})
	}
	return p, err
}

// quiet makes sure that the peer neither says anything nor ends the connection.
func (b *bench) quiet(conn *net.UnixConn, d time.Duration, why string) {
	p, err := b.recvWithin(conn, d)
	defer p.close()
	switch {
	case err == nil:
		b.broken("%s, it sent %s", why, p)
	case !errors.Is(err, os.ErrDeadlineExceeded):
		b.broken("%s, the connection ended: %v", why, err)
	}
}

// ended makes sure that the peer ends the connection, and says nothing before.
// It returns after how long.
func (b *bench) ended(conn *net.UnixConn, within time.Duration, why string) time.Duration {
	start := time.Now()
	p, err := b.recvWithin(conn, within)
	defer p.close()
	switch {
	case err == nil:
		b.broken("%s, it sent %s in place of ending the connection", why, p)
	case errors.Is(err, os.ErrDeadlineExceeded):
		b.broken("%s, the connection is still open after %v", why, within)
	}
	return time.Since(start)
}

// hungUp tells whether the peer has closed its end already, whatever it sent before.
func hungUp(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	hup := false
	raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		unix.Poll(p, 0)
		hup = p[0].Revents&(unix.POLLHUP|unix.POLLRDHUP|unix.POLLERR) != 0
	})
	return hup
}

// oneLine makes foreign text fit for a table.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
