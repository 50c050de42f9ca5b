package agent

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/testmain"
	"ambient-emulator/internal/uds"
)

func (n *node) dialControl() *net.UnixConn {
	n.t.Helper()
	conn, _, err := uds.Dial(context.Background(), control.Network, n.a.cfg.Control)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return conn
}

// What a client may do wrong costs it an answer in words, and the agent nothing.
func TestVerbsGarbage(t *testing.T) {
	n := startWith(t, Config{}, hasty(200*time.Millisecond))
	web := netnstest.New(t)
	before := testmain.Descriptors()
	for _, tt := range []struct {
		packet string
		fd     int
		want   string
	}{
		{"garbage", fdpass.NoFD, "the request: decode: "},
		{"garbage", web.FD(), "the request: decode: "},
		{`{"verb":"list"}`, fdpass.NoFD, "the two are of different versions"},
		{`{"version":2,"verb":[]}`, web.FD(), "the two are of different versions"},
		{`{"version":1,"verb":"dance"}`, fdpass.NoFD, `the agent knows no verb \"dance\"`},
		{`{"version":1,"verb":"list"}`, web.FD(), "list takes no descriptor"},
		{`{"version":1,"verb":"add"}`, fdpass.NoFD, "no descriptor came with the request"},
		{`{"version":1,"verb":"add"}`, web.FD(), "the pod's name is empty"},
		{`{"version":1,"verb":"add"}`, 0, "the descriptor is refused: not a network namespace"},
		{`{"version":1,"verb":"add","pod":{"name":"a\nb","namespace":"d","serviceAccount":"s","uid":"u"}}`, web.FD(), `can't be printed`},
		{`{"version":1,"verb":"add","pod":{"name":"` + strings.Repeat("n", 1024) + `","namespace":"d","serviceAccount":"s","uid":"u"}}`, web.FD(), "longer than the 1024 bytes"},
		{strings.Repeat(" ", control.MaxRequest+1), web.FD(), "message longer than the buffer"},
		{"", fdpass.NoFD, "no answer in time"}, // silent
	} {
		conn := n.dialControl()
		if tt.packet != "" {
			if err := fdpass.Send(conn, []byte(tt.packet), tt.fd); err != nil {
				t.Fatal(err)
			}
		}
		b := make([]byte, control.MaxReply)
		k, _, err := fdpass.Recv(conn, b)
		if got := string(b[:k]); err != nil || !strings.Contains(got, tt.want) {
			t.Errorf("%.60q: %s, %v, want %s", tt.packet, got, err, tt.want)
		}
		conn.Close()
	}
	if len(n.list()) != 0 {
		t.Error("a pod came of it")
	}
	eventually(t, "descriptors are as before", func() bool { return len(testmain.Descriptors()) == len(before) })
}

// A verb that hangs up gives its place back at once.
func TestVerbHangsUp(t *testing.T) {
	n := start(t)
	web := netnstest.New(t)
	ctx, cancel := context.WithCancel(context.Background())
	gone := make(chan error)
	go func() {
		_, err := control.Call(ctx, n.a.cfg.Control, control.Request{Verb: control.Add, Pod: named("web"), Wait: time.Hour}, web.FD(), func(control.Reply) { cancel() })
		gone <- err
	}()
	if err := <-gone; err == nil {
		t.Error("nobody answered, and the verb did not mind")
	}
	eventually(t, "the waiter is gone", func() bool {
		n.a.mu.Lock()
		defer n.a.mu.Unlock()
		return len(n.a.pods["uid-web"].waiters) == 0
	})
}

// listUnread asks for a list that is longer than a socket holds, and reads no
// more of it than that it has begun.
func (n *node) listUnread() *net.UnixConn {
	n.t.Helper()
	for i, ns := range manySpaces(n.t, 600) {
		n.addNow(named(fmt.Sprint("pod-", i)), ns)
	}
	conn := n.dialControl()
	if err := fdpass.Send(conn, []byte(`{"version":1,"verb":"list"}`), fdpass.NoFD); err != nil {
		n.t.Fatal(err)
	}
	if _, _, err := fdpass.Recv(conn, make([]byte, control.MaxReply)); err != nil {
		n.t.Fatal(err)
	}
	return conn
}

// One that does not read costs one deadline, not one a pod.
func TestVerbDoesNotRead(t *testing.T) {
	n := startWith(t, Config{}, hasty(200*time.Millisecond))
	conn := n.listUnread()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the agent hangs up", func() bool {
		poll := make([]unix.PollFd, 1)
		raw.Control(func(fd uintptr) {
			poll[0].Fd = int32(fd)
			_, err = unix.Poll(poll, 0)
		})
		return err == nil && poll[0].Revents&unix.POLLHUP != 0
	})
}

// Nor does it keep the agent from stopping.
func TestStopBesideVerbThatDoesNotRead(t *testing.T) {
	n := startWith(t, Config{}, hasty(time.Hour))
	conn := n.listUnread()
	stopped := make(chan struct{})
	go func() { n.stop(); close(stopped) }()
	select {
	case <-stopped:
	case <-time.After(patience):
		t.Error("the agent does not stop")
		conn.Close()
		<-stopped
	}
}

// Verbs that wait hear that the pod went, was replaced, or the agent stops.
func TestWaitersAreTold(t *testing.T) {
	n := start(t)
	one, two := netnstest.New(t), netnstest.New(t)
	wait := func() chan error {
		added := make(chan error, 1)
		go func() { _, err := n.add(named("web"), one, patience); added <- err }()
		eventually(t, "add waits", func() bool {
			n.a.mu.Lock()
			defer n.a.mu.Unlock()
			p := n.a.pods["uid-web"]
			return p != nil && len(p.waiters) == 1
		})
		return added
	}
	added := wait()
	n.addNow(named("web"), two)
	if err := <-added; err == nil || err.Error() != ErrReplaced.Error() {
		t.Error(err)
	}
	added = wait()
	if err := n.del(named("web"), patience); err != nil {
		t.Error(err)
	}
	if err := <-added; err == nil || err.Error() != ErrDeleted.Error() {
		t.Error(err)
	}
	added = wait()
	n.stop()
	if err := <-added; err == nil || err.Error() != ErrStopping.Error() {
		t.Error(err)
	}
}

// Some hundred verbs at once, and the list among them.
func TestManyVerbs(t *testing.T) {
	n := start(t)
	const clients = 300
	errs := make(chan error, clients)
	spaces := manySpaces(t, clients)
	for i, ns := range spaces {
		go func() { _, err := n.add(named(fmt.Sprint("pod-", i)), ns, patience); errs <- err }()
	}
	eventually(t, "all wait", func() bool { return len(n.list()) == clients })
	z := n.ztunnel()
	for range clients {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if len(z.held) != clients {
		t.Errorf("%d adds", len(z.held))
	}
}

// Who is neither root nor this user gets nothing.
func TestUntrusted(t *testing.T) {
	if !testmain.RealRoot() {
		t.Skip("needs real root: another user has to connect")
	}
	n := start(t)
	dir := filepath.Dir(n.a.cfg.ZDS)
	for _, path := range []string{filepath.Dir(dir), dir, n.a.cfg.ZDS, n.a.cfg.Control} {
		if err := unix.Chmod(path, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{n.a.cfg.ZDS, n.a.cfg.Control} {
		conn := dialAs(t, path, 65534)
		b := make([]byte, control.MaxReply)
		k, _, err := fdpass.Recv(conn, b)
		if path == n.a.cfg.ZDS {
			if err == nil {
				t.Errorf("a stranger gets % x", b[:k])
			}
		} else if !strings.Contains(string(b[:k]), "neither root nor this user") {
			t.Errorf("a stranger gets %q, %v", b[:k], err)
		}
		conn.Close()
	}
	n.await(`msg="ztunnel refused"`)
	n.await(`msg="verb refused"`)
}

// dialAs connects as another user: the credentials of a socket are those of the
// thread that connects.
func dialAs(t *testing.T, path string, uid int) *net.UnixConn {
	t.Helper()
	dialed := make(chan error)
	var fd int
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread is another user's
		var err error
		if fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err == nil {
			// The raw call changes this thread alone; the library's changes all.
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
				err = errno
			} else {
				err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
			}
		}
		dialed <- err
	}()
	if err := <-dialed; err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(patience))
	return conn.(*net.UnixConn)
}
