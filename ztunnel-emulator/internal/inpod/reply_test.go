package inpod

import (
	"testing"

	"golang.org/x/sys/unix"
)

// An answer leaves by the socket that the query came to, or not at all: its number
// may be another socket's once the pod has closed it.
func TestReplyAfterClose(t *testing.T) {
	var fds [2]int
	var names [2]unix.Sockaddr
	for i := range fds {
		var err error
		if fds[i], err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fds[i])
		if err = unix.Bind(fds[i], &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			t.Fatal(err)
		}
		if names[i], err = unix.Getsockname(fds[i]); err != nil {
			t.Fatal(err)
		}
	}
	p := &pod{sockets: []socket{{fd: fds[0], packets: true}}}
	b := make([]byte, 16)
	p.reply(fds[0], []byte("answer"), names[1])
	if n, err := unix.Read(fds[1], b); err != nil || string(b[:n]) != "answer" {
		t.Fatalf("read %d bytes, %v", n, err)
	}
	p.sockets = nil // as drain leaves it
	p.reply(fds[0], []byte("answer"), names[1])
	if _, err := unix.Read(fds[1], b); err != unix.EAGAIN {
		t.Errorf("another's socket was used: %v", err)
	}
}
