package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/inpod"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// limitRelay is what mutual TLS alone costs in Go, and so the limit of a tunnel
// in Go: a TLS connection for each captured one, io.Copy both ways, and no
// HTTP/2. Certificates, marks and the client's address are as with ztunnel. It
// knows one peer, logs nothing, and asks nobody whether somebody may.
type limitRelay struct {
	ids       *identity.Manager
	own, peer identity.ID
}

// limitBuffer is what one direction copies with: some TLS records.
const limitBuffer = 64 << 10

// relayLimit is `limit OWN PEER CA-FOLDER`, and runs in OWN's pod.
func relayLimit(args []string) error {
	go leaveOnSIGTERM()
	ca, err := identity.OpenCA(args[2])
	if err != nil {
		return err
	}
	l := &limitRelay{ids: identity.NewManager(ca, identity.Options{}), own: podID(args[0]), peer: podID(args[1])}
	outbound, err := listenMarked(proxy.PortOutbound)
	if err != nil {
		return err
	}
	inbound, err := listenMarked(proxy.PortInbound)
	if err != nil {
		return err
	}
	go acceptAll(outbound, l.send)
	fmt.Fprintln(os.Stderr, "relaying")
	acceptAll(inbound, l.receive)
	return nil
}

func podID(name string) identity.ID {
	return identity.ID{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: name}
}

// listenMarked takes connections that were not made to it, too.
func listenMarked(port int) (net.Listener, error) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return transparentAndMarked(raw)
	}}
	config.SetMultipathTCP(false)
	return config.Listen(context.Background(), "tcp4", fmt.Sprintf(":%d", port))
}

func transparentAndMarked(raw syscall.RawConn) (err error) {
	cerr := raw.Control(func(fd uintptr) {
		if err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, inpod.DefaultMark); err == nil {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
		}
	})
	if err == nil {
		err = cerr
	}
	return err
}

// dialMarked connects, with from as the address that the peer sees, unless that
// is zero.
func dialMarked(from netip.Addr, to netip.AddrPort) (*net.TCPConn, error) {
	d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		if err := transparentAndMarked(raw); err != nil {
			return err
		}
		// The port is chosen when the peer is known, and is not ours alone.
		return raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1) })
	}}
	d.SetMultipathTCP(false)
	if from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	c, err := d.Dial("tcp4", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// send is the client's side. The first two bytes are the application's port.
func (l *limitRelay) send(captured net.Conn) error {
	app := captured.(*net.TCPConn)
	raw, err := app.SyscallConn()
	if err != nil {
		return err
	}
	var dst netip.AddrPort
	if cerr := raw.Control(func(fd uintptr) { dst, _, err = proxy.OriginalDst(int(fd)) }); cerr != nil || err != nil {
		return fmt.Errorf("original destination: %w, %w", cerr, err)
	}
	wire, err := dialMarked(netip.Addr{}, netip.AddrPortFrom(dst.Addr(), proxy.PortInbound))
	if err != nil {
		return err
	}
	t := tls.Client(wire, l.ids.ClientConfig(l.own, []identity.ID{l.peer}))
	defer t.Close()
	if _, err := t.Write(binary.BigEndian.AppendUint16(nil, dst.Port())); err != nil {
		return err
	}
	return pump(app, t)
}

// receive is the server's side.
func (l *limitRelay) receive(wire net.Conn) error {
	t := tls.Server(wire, l.ids.ServerConfig(l.own))
	defer t.Close()
	var port [2]byte
	if _, err := io.ReadFull(t, port[:]); err != nil {
		return err
	}
	local := wire.LocalAddr().(*net.TCPAddr).AddrPort().Addr()
	client := wire.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
	app, err := dialMarked(client, netip.AddrPortFrom(local, binary.BigEndian.Uint16(port[:])))
	if err != nil {
		return err
	}
	defer app.Close()
	return pump(app, t)
}

// pump copies both ways until both have ended.
func pump(app *net.TCPConn, t *tls.Conn) error {
	back := make(chan error, 1)
	go func() { back <- copyAndEnd(app, t) }()
	err := copyAndEnd(t, app)
	if berr := <-back; err == nil {
		err = berr
	}
	return err
}

func copyAndEnd(to interface {
	io.Writer
	CloseWrite() error
}, from io.Reader,
) error {
	// Without the methods by which a connection would copy in ways of its own, and
	// in pieces of 32 KiB.
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, limitBuffer))
	to.CloseWrite()
	return err
}
