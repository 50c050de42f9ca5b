package netns_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/fresh"
	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/testmain"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	if os.Getenv("NETNS_TEST_UNLOCKED") != "" {
		unlocked()
	}
	testmain.Run(m)
}

func TestOpenJudges(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		path string
		is   error
		text string
	}{
		{filepath.Join(dir, "missing"), fs.ErrNotExist, "no such file or directory"},
		{file, netns.ErrNotNetNS, "a regular file"},
		{dir, netns.ErrNotNetNS, "a directory"},
		{fifo, netns.ErrNotNetNS, "a pipe"}, // and does not wait for a writer
		{"/dev/null", netns.ErrNotNetNS, "a device"},
		{"/proc/self/ns/mnt", netns.ErrNotNetNS, "another type: mnt"},
		{"/proc/self/ns/user", netns.ErrNotNetNS, "another type: user"},
		{"/proc/self/ns/uts", netns.ErrNotNetNS, "another type: uts"},
	} {
		ns, err := netns.Open(tt.path)
		if err == nil {
			ns.Close()
		}
		if !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), tt.path) {
			t.Errorf("Open(%s): %v, want %v with %q", tt.path, err, tt.is, tt.text)
		}
	}
}

func TestFromFDClosesWhatItRefuses(t *testing.T) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := netns.FromFD(fd); !errors.Is(err, netns.ErrNotNetNS) || !strings.Contains(err.Error(), "anonymous file") {
		t.Errorf("FromFD(epoll): %v", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("the refused descriptor is still open: %v", err)
	}
	path, err := unix.Open("/proc/self/ns/net", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := netns.FromFD(path); !errors.Is(err, netns.ErrNotNetNS) || !strings.Contains(err.Error(), "O_PATH") {
		t.Errorf("FromFD(O_PATH): %v", err)
	}
	if _, err := netns.FromFD(fd); !errors.Is(err, unix.EBADF) {
		t.Errorf("FromFD(closed): %v, want EBADF", err)
	}
}

func TestIdentity(t *testing.T) {
	a, b := netnstest.New(t), netnstest.New(t)
	if flags, err := unix.FcntlInt(uintptr(a.FD()), unix.F_GETFD, 0); flags&unix.FD_CLOEXEC == 0 || err != nil {
		t.Errorf("not close-on-exec: %#x, %v", flags, err)
	}
	again := netnstest.Dup(t, a)
	defer again.Close()
	if again.FD() == a.FD() || again.ID() != a.ID() {
		t.Errorf("a second descriptor of %v: fd %d is %v", a.ID(), again.FD(), again.ID())
	}
	if a.ID() == b.ID() {
		t.Errorf("two namespaces with one identity %v", a.ID())
	}
	link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", a.FD()))
	if err != nil || link != a.ID().String() {
		t.Errorf("the kernel prints %q (%v), we print %q", link, err, a.ID())
	}
}

// A socket made inside stays there; the process stays outside.
func TestDo(t *testing.T) {
	home, err := netns.Home()
	if err != nil {
		t.Fatal(err)
	}
	pod := netnstest.New(t)
	var l net.Listener
	var inside string
	visit, err := pod.Do(func() (err error) {
		inside, _ = os.Readlink("/proc/thread-self/ns/net")
		l, err = net.Listen("tcp", "127.0.0.1:15008")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if inside != pod.ID().String() {
		t.Errorf("the function ran in %s, want %v", inside, pod.ID())
	}
	if visit.Home != home.ID() || visit.Inside != pod.ID() || visit.Back != home.ID() || visit.TID == 0 {
		t.Errorf("visit: %+v", visit)
	}
	if _, err := net.Dial("tcp", "127.0.0.1:15008"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial from home: %v, want refused", err)
	}
	if _, err := pod.Do(func() error {
		conn, err := net.Dial("tcp", "127.0.0.1:15008")
		if err == nil {
			conn.Close()
		}
		return err
	}); err != nil {
		t.Errorf("dial from inside: %v", err)
	}
}

func TestDoReturnsTheFunctionsError(t *testing.T) {
	sentinel := errors.New("sentinel")
	if _, err := netnstest.New(t).Do(func() error { return sentinel }); err != sentinel {
		t.Errorf("got %v", err)
	}
}

func TestDoOfAClosedNamespace(t *testing.T) {
	ns, err := fresh.Make()
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
	ran := false
	if _, err := ns.Do(func() error { ran = true; return nil }); !errors.Is(err, unix.EBADF) || ran {
		t.Errorf("got %v, ran %v", err, ran)
	}
}

// The way back is really refused by the kernel: the function drops
// CAP_SYS_ADMIN, which belongs to a thread, and setns(2) then says EPERM.
func TestStrandedThreadIsDestroyed(t *testing.T) {
	pod := netnstest.New(t)
	for range 3 {
		visit, err := pod.Do(dropCapabilities)
		if !errors.Is(err, netns.ErrStranded) || !errors.Is(err, unix.EPERM) {
			t.Fatalf("got %v, want stranded by EPERM", err)
		}
		task := fmt.Sprintf("/proc/self/task/%d", visit.TID)
		waitFor(t, "the thread's end", func() bool {
			_, err := os.Stat(task)
			return errors.Is(err, fs.ErrNotExist)
		})
		if _, err := pod.Do(func() error { return nil }); err != nil {
			t.Fatalf("the next visit: %v", err)
		}
	}
	if astray := testmain.ThreadsAstray(); len(astray) > 0 {
		t.Errorf("threads left in the pod: %v", astray)
	}
}

// A kernel that says it has moved the thread, and has not: a seccomp filter on
// the thread makes setns(2) a success that does nothing. The look at where the
// thread really is finds out.
func TestReturnIsVerified(t *testing.T) {
	pod := netnstest.New(t)
	visit, err := pod.Do(fakeSetns)
	if !errors.Is(err, netns.ErrStranded) || visit.Back != pod.ID() || !strings.Contains(err.Error(), "found itself in "+pod.ID().String()) {
		t.Fatalf("got %v, back in %v", err, visit.Back)
	}
	if _, err := pod.Do(func() error { return nil }); err != nil {
		t.Fatalf("the next visit: %v", err)
	}
}

// fakeSetns makes setns do nothing, successfully, on the calling thread.
func fakeSetns() error {
	const nr, ret0, allow = 0, unix.SECCOMP_RET_ERRNO, unix.SECCOMP_RET_ALLOW
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: nr},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SETNS, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: ret0},
		{Code: unix.BPF_RET | unix.BPF_K, K: allow},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		return os.NewSyscallError("prctl PR_SET_SECCOMP", err)
	}
	return nil
}

// Both errors are told when the function fails and the way back too.
func TestStrandedAndFailed(t *testing.T) {
	sentinel := errors.New("sentinel")
	_, err := netnstest.New(t).Do(func() error { return errors.Join(dropCapabilities(), sentinel) })
	if !errors.Is(err, netns.ErrStranded) || !errors.Is(err, sentinel) {
		t.Errorf("got %v", err)
	}
}

func dropCapabilities() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	return os.NewSyscallError("capset", unix.Capset(&hdr, &none[0]))
}

// While hundreds of threads visit, everybody else is always at home.
func TestDoDisturbsNobody(t *testing.T) {
	home, err := netns.Home()
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var bystanders sync.WaitGroup
	for range 4 {
		bystanders.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if got, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || got != home.ID().String() {
					t.Errorf("a bystander found itself in %s (%v)", got, err)
					return
				}
				runtime.Gosched()
			}
		})
	}
	var visitors sync.WaitGroup
	for range 8 {
		pod := netnstest.New(t)
		for range 32 {
			visitors.Go(func() {
				for range 10 {
					_, err := pod.Do(func() error {
						got, err := os.Readlink("/proc/thread-self/ns/net")
						if got != pod.ID().String() {
							return fmt.Errorf("inside %v: in %s (%v)", pod.ID(), got, err)
						}
						return nil
					})
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	visitors.Wait()
	close(stop)
	bystanders.Wait()
	if astray := testmain.ThreadsAstray(); len(astray) > 0 {
		t.Errorf("threads left in a pod: %v", astray)
	}
}

func TestProbe(t *testing.T) {
	if err := netns.Probe(); err != nil {
		t.Errorf("in a private world: %v", err)
	}
}

// A program that forgot to lock its main thread is told so.
func TestMainThreadIsRefused(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "NETNS_TEST_UNLOCKED=1", "GOMAXPROCS=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// unlocked is that program.
func unlocked() {
	runtime.UnlockOSThread()
	for range 10_000 {
		if err := netns.Probe(); errors.Is(err, netns.ErrMainThread) {
			os.Exit(0)
		}
	}
	fmt.Fprintln(os.Stderr, "the main thread was never refused")
	os.Exit(1)
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within 5 s", what)
		}
	}
}
