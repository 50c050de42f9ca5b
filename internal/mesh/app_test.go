package mesh

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/pires/go-proxyproto"
	"golang.org/x/sys/unix"

	"ambient-emulator/internal/worldtest"
)

// echoTwice is the pod's application on 8080: it says everything twice.
func (p *pod) echoTwice(t *testing.T) *worldtest.Service {
	t.Helper()
	return p.Serve(t, p.At(8080), readDoubleWrite)
}

func readDoubleWrite(c *worldtest.Conn) {
	b := make([]byte, 64<<10)
	for {
		n, err := c.Read(b)
		if _, werr := c.Write(append(b[:n:n], b[:n]...)); err != nil || werr != nil {
			return
		}
	}
}

const hello = "hello world"

// talks has the echo-twice server answer once on a connection.
func talks(t *testing.T, c *worldtest.Conn) {
	t.Helper()
	c.Say(t, hello)
	c.Hears(t, hello+hello)
}

// request is a connection for one request and its answer.
func (p *pod) request(t *testing.T, to netip.AddrPort, answer string) {
	t.Helper()
	c := p.Dial(t, to)
	c.Say(t, hello)
	c.Hears(t, answer)
	c.Close()
}

// isRefused connects, which goes well, and is reset.
func (p *pod) isRefused(t *testing.T, to netip.AddrPort) {
	t.Helper()
	c := p.Dial(t, to)
	if _, err := io.WriteString(c, hello); err == nil {
		c.HearsReset(t)
	} else if !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		t.Errorf("write: %v: want a reset", err)
	}
}

// breaks waits for the end of a connection, in whatever way.
func breaks(t *testing.T, c *worldtest.Conn) {
	t.Helper()
	for {
		if _, err := c.Read(make([]byte, 64<<10)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the connection goes on")
			return
		} else if err != nil {
			return
		}
	}
}

// forwardTo serves a connection by one to another place, until both have ended.
func (p *pod) forwardTo(c io.ReadWriter, to netip.AddrPort) {
	onward, err := p.Connect(to)
	if err != nil {
		return
	}
	defer onward.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(onward, c)
		onward.CloseWrite()
	}()
	io.Copy(c, onward)
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		w.CloseWrite()
	}
	<-done
}

// forwardByProxyHeader is a waypoint's application behind a PROXY tunnel: each
// connection says where it wants to go. headers gets what it said.
func (p *pod) forwardByProxyHeader(headers chan<- *proxyproto.Header) func(*worldtest.Conn) {
	return func(c *worldtest.Conn) {
		r := bufio.NewReader(c)
		h, err := proxyproto.Read(r)
		if err != nil {
			return
		}
		headers <- h
		p.forwardTo(buffered{r, c}, h.DestinationAddr.(*net.TCPAddr).AddrPort())
	}
}

// buffered is a connection of which something has been read already.
type buffered struct {
	*bufio.Reader
	c *worldtest.Conn
}

func (b buffered) Write(p []byte) (int, error) { return b.c.Write(p) }
func (b buffered) CloseWrite() error           { return b.c.CloseWrite() }
