package zds

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/netns"
)

// Conn is one end of a ZDS connection. Its methods do not serialise: there is
// one speaker, and at most one request on its way.
type Conn struct {
	*net.UnixConn
	// Trace, if set, is told of each packet after it has gone or come.
	Trace func(Packet)

	buf  [MaxPacket]byte
	last time.Time // when the last packet went or came, for Trace
}

// NewConn takes conn over.
func NewConn(conn *net.UnixConn) *Conn { return &Conn{UnixConn: conn, last: time.Now()} }

// SendHello is ztunnel's first word.
func (c *Conn) SendHello() error {
	return c.send(&ZdsHello{Version: Version_V1}, fdpass.NoFD)
}

// ReadHello waits for it.
func (c *Conn) ReadHello() (Version, error) {
	b, _, err := c.recv(new(ZdsHello), false)
	if err != nil {
		return 0, err
	}
	return ParseHello(b)
}

// SendRequest sends a request, with fd unless that is fdpass.NoFD. fd stays the
// caller's.
func (c *Conn) SendRequest(req *WorkloadRequest, fd int) error { return c.send(req, fd) }

// ReadRequest waits for a request. The descriptor, of an add, is the caller's
// and has not been judged. io.EOF: the agent is gone. Any other error may be
// told to the agent, and then the connection is of no more use.
func (c *Conn) ReadRequest() (req *WorkloadRequest, fd int, err error) {
	b, fd, err := c.recv(new(WorkloadRequest), true)
	switch {
	case errors.Is(err, fdpass.ErrMany):
		//lint:ignore ST1005 ztunnel writes it so
		return nil, fdpass.NoFD, fmt.Errorf("Expected 1 FD, got more: %w", err)
	case errors.Is(err, fdpass.ErrTruncated):
		return nil, fdpass.NoFD, fmt.Errorf("received truncated message: %w", err)
	case err != nil:
		return nil, fdpass.NoFD, err
	}
	req, err = ParseRequest(b, fd != fdpass.NoFD)
	if err != nil {
		if fd != fdpass.NoFD {
			unix.Close(fd)
		}
		return nil, fdpass.NoFD, err
	}
	return req, fd, nil
}

// Respond answers the last request: done when nack is empty.
func (c *Conn) Respond(nack string) error { return c.send(Response(nack), fdpass.NoFD) }

// ReadResponse waits for the answer to the last request, and returns the text
// of a nack or "".
func (c *Conn) ReadResponse() (nack string, err error) {
	b, _, err := c.recv(new(WorkloadResponse), false)
	if err != nil {
		return "", err
	}
	return ParseResponse(b)
}

func (c *Conn) send(m proto.Message, fd int) error {
	b, err := encode(m)
	if err != nil {
		return err
	}
	if err := fdpass.Send(c.UnixConn, b, fd); err != nil {
		return err
	}
	c.trace(true, b, fd, m)
	return nil
}

// recv receives one packet; b is good until the next. Where no descriptor is
// expected, one that comes all the same is closed and is an error.
func (c *Conn) recv(kind proto.Message, mayCarryFD bool) (b []byte, fd int, err error) {
	n, fd, err := fdpass.Recv(c.UnixConn, c.buf[:])
	if err != nil {
		return nil, fdpass.NoFD, err
	}
	b = c.buf[:n]
	c.trace(false, b, fd, kind)
	if fd != fdpass.NoFD && !mayCarryFD {
		unix.Close(fd)
		return nil, fdpass.NoFD, ErrWithDescriptor
	}
	return b, fd, nil
}

// Packet is one packet for whoever watches the wire.
type Packet struct {
	Sent    bool
	Bytes   []byte        // good during the call only
	Message proto.Message // decoded, or nil if it does not decode
	FD      int           // its number in this process, or fdpass.NoFD
	After   time.Duration // since the packet before it, in either direction
}

func (c *Conn) trace(sent bool, b []byte, fd int, m proto.Message) {
	if c.Trace == nil {
		return
	}
	now := time.Now()
	if !sent && proto.Unmarshal(b, m) != nil {
		m = nil
	}
	c.Trace(Packet{Sent: sent, Bytes: b, Message: m, FD: fd, After: now.Sub(c.last)})
	c.last = now
}

// String prints the packet on one line: direction, message, the descriptor's
// namespace, bytes, and the time since the last packet.
func (p Packet) String() string {
	var s strings.Builder
	s.WriteString("zds <- ")
	if p.Sent {
		s.Reset()
		s.WriteString("zds -> ")
	}
	s.WriteString(Describe(p.Message))
	if p.FD != fdpass.NoFD {
		if id, err := netns.Judge(p.FD); err == nil {
			fmt.Fprintf(&s, " fd %d = %v", p.FD, id)
		} else {
			fmt.Fprintf(&s, " fd %d (%v)", p.FD, err)
		}
	}
	fmt.Fprintf(&s, " [% x] +%d µs", p.Bytes, p.After.Microseconds())
	return s.String()
}

// Describe names a message as a person would.
func Describe(m proto.Message) string {
	switch m := m.(type) {
	case *ZdsHello:
		return fmt.Sprintf("hello version=%v", m.Version)
	case *WorkloadRequest:
		switch p := m.Payload.(type) {
		case *WorkloadRequest_Add:
			if p.Add.WorkloadInfo == nil {
				return fmt.Sprintf("add uid=%q without workload_info", p.Add.Uid)
			}
			i := p.Add.WorkloadInfo
			return fmt.Sprintf("add uid=%q name=%q namespace=%q service_account=%q", p.Add.Uid, i.Name, i.Namespace, i.ServiceAccount)
		case *WorkloadRequest_Keep:
			return fmt.Sprintf("keep uid=%q", p.Keep.Uid)
		case *WorkloadRequest_Del:
			return fmt.Sprintf("del uid=%q", p.Del.Uid)
		case *WorkloadRequest_SnapshotSent:
			return "snapshot_sent"
		}
		return "request without payload"
	case *WorkloadResponse:
		switch {
		case m.Payload == nil:
			return "response without payload"
		case m.GetAck().GetError() != "":
			return fmt.Sprintf("nack %q", m.GetAck().GetError())
		}
		return "ack"
	}
	return "undecodable"
}

// Gone tells whether an error means that the peer has left, rather than said
// something wrong.
func Gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, net.ErrClosed)
}

func toValid(s string) string { return strings.ToValidUTF8(s, "") }
