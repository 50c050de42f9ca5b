package fdpass

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/testmain"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { testmain.Run(m) }

var kinds = map[string]int{"stream": unix.SOCK_STREAM, "seqpacket": unix.SOCK_SEQPACKET, "dgram": unix.SOCK_DGRAM}

// pair returns two connected sockets.
func pair(t *testing.T, kind int) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

// sendRaw sends what Send never would. It is the bare system call because the
// libraries add a byte to an empty message.
func sendRaw(t *testing.T, conn *net.UnixConn, b []byte, fds ...int) {
	t.Helper()
	var hdr unix.Msghdr
	if len(b) > 0 {
		iov := &unix.Iovec{Base: &b[0]}
		iov.SetLen(len(b))
		hdr.Iov = iov
		hdr.SetIovlen(1)
	}
	if len(fds) > 0 {
		oob := unix.UnixRights(fds...)
		hdr.Control = &oob[0]
		hdr.SetControllen(len(oob))
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		if _, _, errno := unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&hdr)), unix.MSG_NOSIGNAL); errno != 0 {
			t.Errorf("sendmsg: %v", errno)
		}
	}); err != nil {
		t.Fatal(err)
	}
}

func TestRoundTrip(t *testing.T) {
	for name, kind := range kinds {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t, kind)
			buf := make([]byte, 8)

			if err := Send(a, []byte("one"), NoFD); err != nil {
				t.Fatal(err)
			}
			n, fd, err := Recv(b, buf)
			if string(buf[:n]) != "one" || fd != NoFD || err != nil {
				t.Errorf("without a descriptor: %q, fd %d, %v", buf[:n], fd, err)
			}

			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if err := Send(a, []byte("two"), int(w.Fd())); err != nil {
				t.Fatal(err)
			}
			w.Close() // the message holds it open
			n, fd, err = Recv(b, buf)
			if string(buf[:n]) != "two" || fd == NoFD || err != nil {
				t.Fatalf("with a descriptor: %q, fd %d, %v", buf[:n], fd, err)
			}
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("not close-on-exec: flags %#x, %v", flags, err)
			}
			unix.Write(fd, []byte("through"))
			unix.Close(fd)
			if got, _ := io.ReadAll(r); string(got) != "through" {
				t.Errorf("the pipe carried %q", got)
			}
		})
	}
}

// Whatever is refused leaves the table as it was.
func TestRefusals(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fd := int(null.Fd())
	for _, tt := range []struct {
		name string
		kind int
		b    string
		fds  []int
		want error
	}{
		// Two fit into a buffer made for one, and no flag says so.
		{"two descriptors", unix.SOCK_STREAM, "x", []int{fd, fd}, ErrMany},
		{"two descriptors", unix.SOCK_SEQPACKET, "x", []int{fd, fd}, ErrMany},
		{"three descriptors", unix.SOCK_STREAM, "x", []int{fd, fd, fd}, ErrMany},
		{"three descriptors", unix.SOCK_SEQPACKET, "x", []int{fd, fd, fd}, ErrMany},
		{"long packet", unix.SOCK_SEQPACKET, "123456789", nil, ErrTruncated},
		{"long packet and a descriptor", unix.SOCK_SEQPACKET, "123456789", []int{fd}, ErrTruncated},
		{"empty packet", unix.SOCK_SEQPACKET, "", nil, io.EOF},
		{"empty packet and a descriptor", unix.SOCK_SEQPACKET, "", []int{fd}, io.EOF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := pair(t, tt.kind)
			before := testmain.Descriptors()
			sendRaw(t, a, []byte(tt.b), tt.fds...)
			if _, got, err := Recv(b, make([]byte, 8)); !errors.Is(err, tt.want) || got != NoFD {
				t.Errorf("fd %d, %v; want %v", got, err, tt.want)
			}
			if after := testmain.Descriptors(); !slices.Equal(before, after) {
				t.Errorf("descriptors before %q, after %q", before, after)
			}
			// The connection is still good.
			sendRaw(t, a, []byte("good"), fd)
			_, got, err := Recv(b, make([]byte, 8))
			if err != nil {
				t.Fatalf("the next message: %v", err)
			}
			unix.Close(got)
		})
	}
}

// The kernel drops a descriptor that our table has no room for, and says only
// that control data was cut.
func TestTableFull(t *testing.T) {
	for name, kind := range kinds {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t, kind)
			null, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			defer null.Close()
			if err := Send(a, []byte("x"), int(null.Fd())); err != nil {
				t.Fatal(err)
			}
			restore := noMoreDescriptors(t)
			_, fd, err := Recv(b, make([]byte, 8))
			restore()
			if !errors.Is(err, ErrTableFull) || fd != NoFD {
				t.Errorf("fd %d, %v", fd, err)
			}
		})
	}
}

// noMoreDescriptors makes the table full until the result is called.
func noMoreDescriptors(t *testing.T) (restore func()) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	return func() { unix.Setrlimit(unix.RLIMIT_NOFILE, &old) }
}

func TestEndOfStream(t *testing.T) {
	for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_SEQPACKET} {
		a, b := pair(t, kind)
		a.Close()
		if _, _, err := Recv(b, make([]byte, 8)); !errors.Is(err, io.EOF) {
			t.Errorf("kind %d: %v, want EOF", kind, err)
		}
		if err := Send(b, []byte("x"), NoFD); !errors.Is(err, unix.EPIPE) {
			t.Errorf("kind %d: send to nobody: %v, want EPIPE", kind, err)
		}
	}
}

func TestDeadline(t *testing.T) {
	_, b := pair(t, unix.SOCK_STREAM)
	b.SetReadDeadline(time.Now().Add(time.Millisecond))
	if _, _, err := Recv(b, make([]byte, 8)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// Golden bytes: what the kernel writes for one and for two descriptors on a
// 64-bit little-endian machine (cmsg(3)).
func TestDescriptors(t *testing.T) {
	one := []byte{20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0}
	two := []byte{24, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 9, 0, 0, 0}
	creds := append([]byte{28, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0}, make([]byte, 16)...)
	if !bytes.Equal(unix.UnixRights(7)[:20], one) || !bytes.Equal(unix.UnixRights(7, 9), two) {
		t.Error("the library encodes otherwise")
	}
	padded := append(slices.Clone(one), 0, 0, 0, 0)
	for _, tt := range []struct {
		name string
		oob  []byte
		want []int
		bad  bool
	}{
		{"none", nil, nil, false},
		{"one", one, []int{7}, false},
		{"two in one message", two, []int{7, 9}, false},
		{"two messages", append(slices.Clone(padded), one...), []int{7, 7}, false},
		{"behind credentials", append(slices.Clone(creds), one...), []int{7}, false},
		{"credentials alone", creds, nil, false},
		{"length beyond the data", []byte{99, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0}, nil, true},
		{"one and a half", append([]byte{22}, append(slices.Clone(one[1:]), 9, 0)...), []int{7}, false},
		{"half of one", append([]byte{18}, one[1:18]...), nil, false},
		{"good, then bad", append(slices.Clone(padded), 99, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0), []int{7}, true},
	} {
		got, err := descriptors(tt.oob)
		if !slices.Equal(got, tt.want) || (err != nil) != tt.bad {
			t.Errorf("%s: %v, %v", tt.name, got, err)
		}
	}
}

func FuzzDescriptors(f *testing.F) {
	f.Add(unix.UnixRights(1))
	f.Add(unix.UnixRights(1, 2))
	f.Add(append(unix.UnixRights(1), unix.UnixRights(2)...))
	f.Fuzz(func(t *testing.T, oob []byte) {
		if fds, _ := descriptors(oob); len(fds) > len(oob)/4 {
			t.Errorf("%d descriptors out of %d bytes", len(fds), len(oob))
		}
	})
}
