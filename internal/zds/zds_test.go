package zds

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/testmain"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { testmain.Run(m) }

// The bytes of every message, both ways.
func TestGolden(t *testing.T) {
	for _, tt := range []struct {
		hex string
		msg proto.Message
		to  proto.Message
		say string
	}{
		{"08 01", &ZdsHello{Version: Version_V1}, new(ZdsHello), "hello version=V1"},
		{"", &ZdsHello{}, new(ZdsHello), "hello version=NOT_USED"},
		{"08 07", &ZdsHello{Version: 7}, new(ZdsHello), "hello version=7"},
		{"0a 00", Response(""), new(WorkloadResponse), "ack"},
		{"0a 04 0a 02 6e 6f", Response("no"), new(WorkloadResponse), `nack "no"`},
		{"1a 00", Snapshot(), new(WorkloadRequest), "snapshot_sent"},
		{"12 04 12 02 75 31", Del("u1"), new(WorkloadRequest), `del uid="u1"`},
		{"2a 04 0a 02 75 31", Keep("u1"), new(WorkloadRequest), `keep uid="u1"`},
		{"0a 0f 0a 02 75 31 12 09 0a 01 6e 12 01 64 1a 01 73", Add("u1", "n", "d", "s"), new(WorkloadRequest), `add uid="u1" name="n" namespace="d" service_account="s"`},
		{"0a 04 0a 02 75 31", &WorkloadRequest{Payload: &WorkloadRequest_Add{Add: &AddWorkload{Uid: "u1"}}}, new(WorkloadRequest), `add uid="u1" without workload_info`},
	} {
		want, err := hex.DecodeString(strings.ReplaceAll(tt.hex, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		got, err := encode(tt.msg)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("encode %s: % x (%v), want %s", tt.say, got, err, tt.hex)
		}
		if err := proto.Unmarshal(want, tt.to); err != nil || !proto.Equal(tt.to, tt.msg) {
			t.Errorf("decode %s: %v (%v)", tt.hex, tt.to, err)
		}
		if say := Describe(tt.to); say != tt.say {
			t.Errorf("%s is described as %s, want %s", tt.hex, say, tt.say)
		}
	}
}

func TestParseRequest(t *testing.T) {
	for _, tt := range []struct {
		name   string
		b      string
		withFD bool
		want   error
	}{
		{"add", "\x0a\x04\x0a\x02u1", true, nil},
		{"add without a descriptor", "\x0a\x04\x0a\x02u1", false, ErrNoDescriptor},
		{"del with one", "\x12\x04\x12\x02u1", true, ErrWithDescriptor},
		{"keep with one", "\x2a\x04\x0a\x02u1", true, ErrWithDescriptor},
		{"snapshot with one", "\x1a\x00", true, ErrWithDescriptor},
		{"nothing set", "", false, ErrNoPayload},
		{"unknown member", "\x22\x00", false, ErrNoPayload},
		{"unknown member with a descriptor", "\x22\x00", true, ErrNoPayload},
	} {
		req, err := ParseRequest([]byte(tt.b), tt.withFD)
		if !errors.Is(err, tt.want) || (err == nil) != (req != nil) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	if _, err := ParseRequest([]byte("\x0a\xff"), false); err == nil || !strings.Contains(err.Error(), "decode request 0a ff") {
		t.Errorf("garbage: %v", err)
	}
}

func TestTooLong(t *testing.T) {
	if _, err := encode(Del(strings.Repeat("u", MaxPacket))); !errors.Is(err, ErrTooLong) {
		t.Errorf("got %v", err)
	}
	b, err := encode(Response(strings.Repeat("é", MaxPacket)))
	if err != nil || len(b) > MaxPacket {
		t.Errorf("a long nack: %d bytes, %v", len(b), err)
	}
	if nack, err := ParseResponse(b); err != nil || len(nack) < MaxPacket-8 {
		t.Errorf("comes back with %d bytes, %v", len(nack), err)
	}
}

// connect returns the two ends of a connection.
func connect(t *testing.T) (agent, ztunnel *Conn) {
	t.Helper()
	addr := &net.UnixAddr{Net: Network, Name: filepath.Join(t.TempDir(), "s")}
	l, err := net.ListenUnix(Network, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	z, err := net.DialUnix(Network, nil, addr)
	if err != nil {
		t.Fatal(err)
	}
	a, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	agent, ztunnel = NewConn(a), NewConn(z)
	for _, c := range []*Conn{agent, ztunnel} {
		c.SetDeadline(time.Now().Add(5 * time.Second))
		t.Cleanup(func() { c.Close() })
	}
	return agent, ztunnel
}

func TestConversation(t *testing.T) {
	agent, ztunnel := connect(t)
	var trace []string
	ztunnel.Trace = func(p Packet) { trace = append(trace, p.String()) }
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()

	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(ztunnel.SendHello())
	if v, err := agent.ReadHello(); v != Version_V1 || err != nil {
		t.Errorf("hello %v, %v", v, err)
	}
	check(agent.SendRequest(Add("u1", "n", "d", "s"), int(null.Fd())))
	req, fd, err := ztunnel.ReadRequest()
	check(err)
	if fd == fdpass.NoFD || req.GetAdd().GetUid() != "u1" {
		t.Errorf("add: %v, fd %d", req, fd)
	}
	unix.Close(fd)
	check(ztunnel.Respond(""))
	if nack, err := agent.ReadResponse(); nack != "" || err != nil {
		t.Errorf("ack: %q, %v", nack, err)
	}
	check(agent.SendRequest(Snapshot(), fdpass.NoFD))
	if req, fd, err = ztunnel.ReadRequest(); err != nil || fd != fdpass.NoFD || req.GetSnapshotSent() == nil {
		t.Errorf("snapshot: %v, fd %d, %v", req, fd, err)
	}
	check(ztunnel.Respond("no"))
	if nack, err := agent.ReadResponse(); nack != "no" || err != nil {
		t.Errorf("nack: %q, %v", nack, err)
	}
	agent.Close()
	if _, _, err := ztunnel.ReadRequest(); !errors.Is(err, io.EOF) || !Gone(err) {
		t.Errorf("after the end: %v", err)
	}

	for i, want := range []string{
		"zds -> hello version=V1 [08 01] +",
		`zds <- add uid="u1" name="n" namespace="d" service_account="s" fd `,
		"zds -> ack [0a 00] +",
		"zds <- snapshot_sent [1a 00] +",
		`zds -> nack "no" [0a 04 0a 02 6e 6f] +`,
	} {
		if i >= len(trace) || !strings.HasPrefix(trace[i], want) {
			t.Errorf("trace: %q\nwant %d: %q", trace, i, want)
		}
	}
}

// Whatever is refused leaves no descriptor open.
func TestRefusals(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fd := int(null.Fd())
	add, _ := encode(Add("u1", "n", "d", "s"))
	for _, tt := range []struct {
		name string
		b    []byte
		fds  []int
		want error
	}{
		{"add without a descriptor", add, nil, ErrNoDescriptor},
		{"add with two", add, []int{fd, fd}, fdpass.ErrMany},
		{"add with three", add, []int{fd, fd, fd}, fdpass.ErrMany},
		{"snapshot with one", []byte{0x1a, 0}, []int{fd}, ErrWithDescriptor},
		{"unknown member with one", []byte{0x22, 0}, []int{fd}, ErrNoPayload},
		{"too long", bytes.Repeat([]byte{0x1a, 0}, MaxPacket), []int{fd}, fdpass.ErrTruncated},
		{"garbage with one", []byte{0x0a, 0xff}, []int{fd}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			agent, ztunnel := connect(t)
			before := len(testmain.Descriptors())
			var oob []byte
			if len(tt.fds) > 0 {
				oob = unix.UnixRights(tt.fds...)
			}
			if _, _, err := agent.WriteMsgUnix(tt.b, oob, nil); err != nil {
				t.Fatal(err)
			}
			if _, got, err := ztunnel.ReadRequest(); err == nil || got != fdpass.NoFD || tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("fd %d, %v; want %v", got, err, tt.want)
			}
			if after := len(testmain.Descriptors()); after != before {
				t.Errorf("%d descriptors before, %d after", before, after)
			}
		})
	}
	t.Run("hello with one", func(t *testing.T) {
		agent, ztunnel := connect(t)
		before := len(testmain.Descriptors())
		if _, _, err := ztunnel.WriteMsgUnix([]byte{8, 1}, unix.UnixRights(fd), nil); err != nil {
			t.Fatal(err)
		}
		if _, err := agent.ReadHello(); !errors.Is(err, ErrWithDescriptor) {
			t.Errorf("got %v", err)
		}
		if after := len(testmain.Descriptors()); after != before {
			t.Errorf("%d descriptors before, %d after", before, after)
		}
	})
}

func FuzzRequest(f *testing.F) {
	for _, req := range []*WorkloadRequest{Add("u1", "n", "d", "s"), Keep("u1"), Del("u1"), Snapshot()} {
		b, _ := encode(req)
		f.Add(b, true)
		f.Add(b, false)
	}
	f.Fuzz(func(t *testing.T, b []byte, withFD bool) {
		req, err := ParseRequest(b, withFD)
		if err == nil && (req.GetAdd() != nil) != withFD {
			t.Errorf("% x with a descriptor %v: %v", b, withFD, req)
		}
		if raw := new(WorkloadRequest); proto.Unmarshal(b, raw) == nil {
			Describe(raw)
		}
	})
}

func FuzzResponse(f *testing.F) {
	b, _ := encode(Response("no"))
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if nack, err := ParseResponse(b); err != nil && nack != "" {
			t.Errorf("% x: %q with %v", b, nack, err)
		}
	})
}
