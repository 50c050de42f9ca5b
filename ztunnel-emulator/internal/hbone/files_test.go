package hbone

import (
	"fmt"
	"net"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// listenFiles is listen as the proxy does it: sockets, not net.Conns.
func listenFiles(b *testing.B, serve func(*os.File)) string {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	l := os.NewFile(uintptr(fd), "listener")
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		b.Fatal(err)
	}
	if err := unix.Listen(fd, 1024); err != nil {
		b.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		b.Fatal(err)
	}
	raw, err := l.SyscallConn()
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			fd := -1
			var aerr error
			err := raw.Read(func(lfd uintptr) bool {
				fd, _, aerr = unix.Accept4(int(lfd), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
				return aerr != unix.EAGAIN
			})
			if err != nil || aerr != nil {
				return
			}
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
			go serve(os.NewFile(uintptr(fd), "app"))
		}
	}()
	b.Cleanup(func() { l.Close(); <-done })
	return fmt.Sprintf("127.0.0.1:%d", sa.(*unix.SockaddrInet4).Port)
}

// dialFile connects a plain socket.
func dialFile(to *net.TCPAddr) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	sa := &unix.SockaddrInet4{Port: to.Port}
	copy(sa.Addr[:], to.IP.To4())
	err = unix.Connect(fd, sa)
	f := os.NewFile(uintptr(fd), "app")
	if err != nil && err != unix.EINPROGRESS {
		f.Close()
		return nil, err
	}
	raw, rerr := f.SyscallConn()
	if rerr != nil {
		f.Close()
		return nil, rerr
	}
	rerr = raw.Write(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if n, _ := unix.Poll(p, 0); n == 0 {
			return false
		}
		n, _ := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if n != 0 {
			err = syscall.Errno(n)
		} else {
			err = nil
		}
		return true
	})
	if rerr == nil {
		rerr = err
	}
	if rerr != nil {
		f.Close()
		return nil, rerr
	}
	return f, nil
}
