package handoff

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/testmain"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { testmain.Run(m) }

// connect returns the two ends of a connection.
func connect(t *testing.T) (sender, receiver *net.UnixConn) {
	t.Helper()
	addr := &net.UnixAddr{Net: "unix", Name: filepath.Join(t.TempDir(), "s")}
	l, err := net.ListenUnix("unix", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if sender, err = net.DialUnix("unix", nil, addr); err != nil {
		t.Fatal(err)
	}
	if receiver, err = l.AcceptUnix(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*net.UnixConn{sender, receiver} {
		c.SetDeadline(time.Now().Add(5 * time.Second))
		t.Cleanup(func() { c.Close() })
	}
	return sender, receiver
}

func open(t *testing.T) int {
	t.Helper()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

func TestSendReceive(t *testing.T) {
	sender, receiver := connect(t)
	if err := Send(sender, open(t)); err != nil {
		t.Fatal(err)
	}
	// The seed's sender closes without reading.
	sender.Close()
	fd, err := Receive(receiver)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
}

// The bytes of the wire, as the seed's own programs write and read them.
func TestGoldenMessage(t *testing.T) {
	sender, receiver := connect(t)
	if err := Send(sender, open(t)); err != nil {
		t.Fatal(err)
	}
	sender.Close()
	buf, oob := make([]byte, 8), make([]byte, 64)
	n, oobn, _, _, err := receiver.ReadMsgUnix(buf, oob)
	if err != nil || !bytes.Equal(buf[:n], []byte{0x01}) {
		t.Fatalf("message % x, %v", buf[:n], err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		t.Fatalf("control messages: %v, %v", msgs, err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		t.Fatalf("descriptors: %v, %v", fds, err)
	}
	unix.Close(fds[0])
}

func TestReceiveRefuses(t *testing.T) {
	fd := open(t)
	for _, tt := range []struct {
		name string
		b    string
		fds  []int
		want error
		text string
	}{
		{"no descriptor", "\x01", nil, ErrNoDescriptor, ""},
		{"two descriptors", "\x01", []int{fd, fd}, fdpass.ErrMany, ""},
		{"three descriptors", "\x01", []int{fd, fd, fd}, fdpass.ErrMany, ""},
		{"wrong first byte", "\x02", []int{fd}, nil, "starts with 0x02"},
		{"wrong byte and no descriptor", "G", nil, nil, "starts with 0x47"},
		{"more than one byte", "\x01\x01", []int{fd}, nil, "starts with 0x0101"},
		{"another protocol", "GET / HTTP/1.1\r\n", nil, nil, "starts with 0x4745"},
		{"nothing", "", nil, ErrSilent, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sender, receiver := connect(t)
			var oob []byte
			if len(tt.fds) > 0 {
				oob = unix.UnixRights(tt.fds...)
			}
			if tt.b != "" {
				if _, _, err := sender.WriteMsgUnix([]byte(tt.b), oob, nil); err != nil {
					t.Fatal(err)
				}
			}
			sender.Close()
			before := len(testmain.Descriptors())
			got, err := Receive(receiver)
			if got != fdpass.NoFD || err == nil || (tt.want != nil && !errors.Is(err, tt.want)) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("fd %d, %v", got, err)
			}
			if after := len(testmain.Descriptors()); after != before {
				t.Errorf("%d descriptors before, %d after", before, after)
			}
		})
	}
}

func TestGoldenReply(t *testing.T) {
	for _, tt := range []struct {
		refusal error
		wire    string
	}{
		{nil, "\x00"},
		{errors.New("no"), "\x01no"},
		{errors.New("not a namespace: naïve"), "\x01not a namespace: naïve"},
		{errors.New("bad \xff byte"), "\x01bad � byte"},
	} {
		if got := string(encodeReply(tt.refusal)); got != tt.wire {
			t.Errorf("encode %v: %q, want %q", tt.refusal, got, tt.wire)
		}
		err := decodeReply([]byte(tt.wire))
		var refused *RefusedError
		switch {
		case tt.refusal == nil && err != nil:
			t.Errorf("decode %q: %v", tt.wire, err)
		case tt.refusal != nil && (!errors.As(err, &refused) || refused.Reason != tt.wire[1:]):
			t.Errorf("decode %q: %v", tt.wire, err)
		}
	}
	long := encodeReply(errors.New(strings.Repeat("é", MaxReason)))
	if len(long) > 1+MaxReason || !utf8.Valid(long[1:]) {
		t.Errorf("a long reason: %d bytes, valid %v", len(long), utf8.Valid(long[1:]))
	}
}

func TestReply(t *testing.T) {
	for _, refusal := range []error{nil, errors.New("busy")} {
		sender, receiver := connect(t)
		if err := Reply(receiver, refusal); err != nil {
			t.Fatal(err)
		}
		if refusal != nil {
			receiver.Close() // ends the reason; after "ready" nobody waits for that
		}
		err := ReadReply(sender)
		var refused *RefusedError
		if refusal == nil && err != nil || refusal != nil && (!errors.As(err, &refused) || err.Error() != "refused: busy") {
			t.Errorf("reply %v: %v", refusal, err)
		}
	}
}

func TestNotConfirmed(t *testing.T) {
	t.Run("seed's receiver closes", func(t *testing.T) {
		sender, receiver := connect(t)
		receiver.Close()
		if err := ReadReply(sender); !errors.Is(err, ErrNotConfirmed) || !errors.Is(err, io.EOF) {
			t.Error(err)
		}
	})
	t.Run("closes with our byte unread", func(t *testing.T) {
		sender, receiver := connect(t)
		if err := Send(sender, open(t)); err != nil {
			t.Fatal(err)
		}
		receiver.Close()
		if err := ReadReply(sender); err != ErrNotTaken {
			t.Error(err)
		}
	})
	t.Run("never replies", func(t *testing.T) {
		sender, _ := connect(t)
		sender.SetReadDeadline(time.Now().Add(time.Millisecond))
		if err := ReadReply(sender); !errors.Is(err, ErrNotConfirmed) || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
	})
}

// A refusal before the message is read reaches the sender although its own
// message is lost, and one cut short is still a refusal.
func TestRefusalSurvives(t *testing.T) {
	sender, receiver := connect(t)
	if err := Send(sender, open(t)); err != nil {
		t.Fatal(err)
	}
	if err := Reply(receiver, errors.New("busy")); err != nil {
		t.Fatal(err)
	}
	receiver.Close() // with a byte unread: the sender is reset
	var refused *RefusedError
	if err := ReadReply(sender); !errors.As(err, &refused) || refused.Reason != "busy" {
		t.Errorf("got %v", err)
	}
}

func TestHostileReply(t *testing.T) {
	err := decodeReply([]byte("\x01\x1b[2Jgone\nsecond line"))
	if err.Error() != "refused: ?[2Jgone?second line" {
		t.Errorf("got %q", err)
	}
	if err := decodeReply([]byte{0x47}); err == nil || !strings.Contains(err.Error(), "0x47") {
		t.Errorf("unknown answer: %v", err)
	}
}

func FuzzReply(f *testing.F) {
	f.Add([]byte{Ready})
	f.Add([]byte("\x01no"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 0 {
			return
		}
		err := decodeReply(b)
		if (err == nil) != (b[0] == Ready) || err != nil && strings.ContainsAny(err.Error(), "\n\x1b") {
			t.Errorf("% x: %v", b, err)
		}
	})
}

func FuzzMessage(f *testing.F) {
	f.Add([]byte{Add}, true)
	f.Add([]byte{0}, false)
	f.Fuzz(func(t *testing.T, b []byte, withFD bool) {
		if err := checkMessage(b, withFD); (err == nil) != (withFD && bytes.Equal(b, []byte{Add})) {
			t.Errorf("% x, %v: %v", b, withFD, err)
		}
	})
}
