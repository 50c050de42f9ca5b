package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"

	"golang.org/x/sys/unix"

	"ambient-emulator/ztunnel-emulator/internal/inpod"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// floorRelay is the least that relaying can cost: one thread, epoll(7), splice(2)
// with a pipe for each direction, and what belongs to captured connections:
// SO_ORIGINAL_DST, marked sockets and, inbound, the client's address. It logs
// nothing, knows no pods and gives up at the first surprise.
type floorRelay struct {
	epoll     int
	listeners map[int]uint16 // descriptor to port
	ends      []*floorEnd    // by descriptor
	port      int            // the last that connect has tried
}

// floorEnd is one of a connection's two ends, and the direction away from it.
type floorEnd struct {
	fd         int
	other      *floorEnd
	r, w       int // the pipe
	level      int // bytes in it
	eof, shut  bool
	connecting bool
	interest   uint32
}

// floorPipe is the size of a pipe that turned out too small: what an ordinary
// user may have.
const floorPipe = 1 << 20

// relayFloor runs in a pod, as the first word "relay" of this program.
func relayFloor([]string) error {
	debug.SetGCPercent(-1) // 2,000 connections are no reason to collect
	go leaveOnSIGTERM()
	f := &floorRelay{listeners: make(map[int]uint16)}
	var err error
	if f.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	for _, port := range []uint16{proxy.PortOutbound, proxy.PortInboundPassthrough} {
		if err := f.listen(port); err != nil {
			return fmt.Errorf("listen at %d: %w", port, err)
		}
	}
	fmt.Fprintln(os.Stderr, "relaying")
	return f.loop()
}

func leaveOnSIGTERM() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGTERM)
	<-c
	os.Exit(0)
}

// marked makes a socket that the rules know as ztunnel's.
func marked(family int) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, inpod.DefaultMark)
}

func (f *floorRelay) listen(port uint16) error {
	fd, err := marked(unix.AF_INET6) // IPv4 as well
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
	}
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet6{Port: int(port)})
	}
	if err == nil {
		err = unix.Listen(fd, unix.SOMAXCONN)
	}
	if err != nil {
		return err
	}
	f.listeners[fd] = port
	return unix.EpollCtl(f.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

func (f *floorRelay) loop() error {
	events := make([]unix.EpollEvent, 128)
	for {
		n, err := unix.EpollWait(f.epoll, events, -1)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("epoll_wait", err)
		}
		for _, ev := range events[:n] {
			fd := int(ev.Fd)
			if port, ok := f.listeners[fd]; ok {
				err = f.accept(fd, port)
			} else if fd < len(f.ends) && f.ends[fd] != nil {
				err = f.serve(f.ends[fd], ev.Events)
			}
			if err != nil {
				return err
			}
		}
	}
}

func (f *floorRelay) accept(l int, port uint16) error {
	fd, _, err := unix.Accept4(l, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("accept4", err)
	}
	dst, _, err := proxy.OriginalDst(fd)
	if err != nil {
		return err
	}
	onward, err := f.connect(fd, port, dst)
	if err != nil {
		return err
	}
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	a, b := &floorEnd{fd: fd}, &floorEnd{fd: onward, connecting: true}
	a.other, b.other = b, a
	for _, e := range []*floorEnd{a, b} {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			return os.NewSyscallError("pipe2", err)
		}
		e.r, e.w = p[0], p[1]
		for len(f.ends) <= e.fd {
			f.ends = append(f.ends, nil)
		}
		f.ends[e.fd] = e
	}
	b.interest = unix.EPOLLOUT
	return errors.Join(
		unix.EpollCtl(f.epoll, unix.EPOLL_CTL_ADD, a.fd, &unix.EpollEvent{Fd: int32(a.fd)}),
		unix.EpollCtl(f.epoll, unix.EPOLL_CTL_ADD, b.fd, &unix.EpollEvent{Events: b.interest, Fd: int32(b.fd)}))
}

// connect begins a connection to dst, inbound by the address of the client at fd.
func (f *floorRelay) connect(fd int, port uint16, dst netip.AddrPort) (int, error) {
	to := &unix.SockaddrInet4{Addr: dst.Addr().As4(), Port: int(dst.Port())}
	var from *unix.SockaddrInet4
	if port == proxy.PortInboundPassthrough {
		peer, err := unix.Getpeername(fd)
		if err != nil {
			return -1, os.NewSyscallError("getpeername", err)
		}
		from = &unix.SockaddrInet4{Addr: proxy.AddrPort(peer).Addr().As4()}
	}
	for {
		onward, err := marked(unix.AF_INET)
		if err != nil {
			return -1, err
		}
		unix.SetsockoptInt(onward, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		if from != nil {
			unix.SetsockoptInt(onward, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
			unix.SetsockoptInt(onward, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			// A port that no client has: where that is the client's own, too, connection
			// tracking takes ours for the client's.
			f.port = (f.port + 1) % 30000
			from.Port = 1024 + f.port
			err = unix.Bind(onward, from)
		}
		if err == nil {
			err = unix.Connect(onward, to)
		}
		if err == nil || err == unix.EINPROGRESS {
			return onward, nil
		}
		unix.Close(onward)
		if from == nil || err != unix.EADDRINUSE && err != unix.EADDRNOTAVAIL {
			return -1, os.NewSyscallError("connect", err)
		}
	}
}

// serve does what an end is ready for.
func (f *floorRelay) serve(e *floorEnd, events uint32) error {
	if e.connecting {
		if code, err := unix.GetsockoptInt(e.fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || code != 0 {
			return f.close(e)
		}
		e.connecting = false
		return errors.Join(f.watch(e), f.watch(e.other))
	}
	ok := true
	if e.other.level > 0 && events&unix.EPOLLOUT != 0 {
		ok = e.other.move()
	}
	if ok && e.level == 0 && !e.eof && events&(unix.EPOLLIN|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		ok = e.move()
	}
	if !ok || e.shut && e.other.shut || events&unix.EPOLLERR != 0 {
		return f.close(e)
	}
	return errors.Join(f.watch(e), f.watch(e.other))
}

// move fills the pipe if that is empty, and empties it. It returns false when
// the connection has broken.
func (e *floorEnd) move() bool {
	const flags = unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK
	if e.level == 0 && !e.eof {
		n, err := unix.Splice(e.fd, nil, e.w, nil, floorPipe, flags)
		if err == unix.EAGAIN {
			return true
		}
		if err != nil {
			return false
		}
		if n >= 64<<10 {
			unix.FcntlInt(uintptr(e.w), unix.F_SETPIPE_SZ, floorPipe)
		}
		e.level, e.eof = int(n), n == 0
	}
	if e.level > 0 {
		n, err := unix.Splice(e.r, nil, e.other.fd, nil, e.level, flags)
		if err != nil && err != unix.EAGAIN {
			return false
		}
		e.level -= max(0, int(n))
	}
	if e.eof && e.level == 0 && !e.shut {
		e.shut = true
		return unix.Shutdown(e.other.fd, unix.SHUT_WR) == nil
	}
	return true
}

// watch tells epoll what is waited for, if that has changed.
func (f *floorRelay) watch(e *floorEnd) error {
	interest := uint32(0)
	if e.level == 0 && !e.eof {
		interest |= unix.EPOLLIN
	}
	if e.other.level > 0 {
		interest |= unix.EPOLLOUT
	}
	if interest == e.interest {
		return nil
	}
	e.interest = interest
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(f.epoll, unix.EPOLL_CTL_MOD, e.fd, &unix.EpollEvent{Events: interest, Fd: int32(e.fd)}))
}

func (f *floorRelay) close(e *floorEnd) error {
	for _, e := range []*floorEnd{e, e.other} {
		f.ends[e.fd] = nil
		unix.Close(e.fd)
		unix.Close(e.r)
		unix.Close(e.w)
	}
	return nil
}
