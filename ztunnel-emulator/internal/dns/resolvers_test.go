package dns

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestReadResolvers(t *testing.T) {
	for _, test := range []struct{ file, want, nodeOnly string }{
		{"nameserver 192.0.2.1\n", "[192.0.2.1:53] 5s 2", "[]"},
		{"# comment\n; another\nsearch a b\n\nnameserver\t192.0.2.1 ignored\nnameserver 2001:db8::1\nsortlist 1\n", "[192.0.2.1:53 [2001:db8::1]:53] 5s 2", "[]"},
		{"nameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n", "[192.0.2.1:53 192.0.2.2:53 192.0.2.3:53] 5s 2", "[]"},
		{"options ndots:5 timeout:1 attempts:4 rotate edns0 trust-ad\nnameserver 192.0.2.1", "[192.0.2.1:53] 1s 4", "[]"},
		{"options timeout:0 attempts:99\nnameserver 192.0.2.1\r\n", "[192.0.2.1:53] 1s 5", "[]"},
		{"nameserver 127.0.0.53\nnameserver ::1\nnameserver 0.0.0.0\n", "[127.0.0.53:53 [::1]:53 0.0.0.0:53] 5s 2", "[127.0.0.53:53 [::1]:53 0.0.0.0:53]"},
		{"nameserver fe80::1%eth0\nnameserver 169.254.20.10\nnameserver ::ffff:127.0.0.1", "[[fe80::1%eth0]:53 169.254.20.10:53 127.0.0.1:53] 5s 2", "[[fe80::1%eth0]:53 127.0.0.1:53]"},
	} {
		r, err := ReadResolvers(write(t, test.file))
		got := fmt.Sprint(r.Servers, r.Timeout, r.Attempts)
		if got != test.want || err != nil || fmt.Sprint(r.NodeOnly()) != test.nodeOnly {
			t.Errorf("%q: %s, %v, of the node only %v", test.file, got, err, r.NodeOnly())
		}
	}
}

func TestBadResolvers(t *testing.T) {
	const advice = `; DNS needs a line "nameserver ADDRESS" there, or none of it: ISTIO_META_DNS_CAPTURE=false`
	dir := t.TempDir()
	for _, test := range []struct{ path, want string }{
		{filepath.Join(dir, "none"), "open PATH: no such file or directory"},
		{dir, "read PATH: is a directory"},
		{write(t, ""), "PATH names no server"},
		{write(t, "nameserver\n#nameserver 192.0.2.1\n"), "PATH names no server"},
		{write(t, "nameserver 192.0.2.1\nnameserver dns.example\n"), `PATH: nameserver "dns.example" is no IP address`},
		{write(t, "nameserver 192.0.2.1:53\n"), `PATH: nameserver "192.0.2.1:53" is no IP address`},
	} {
		r, err := ReadResolvers(test.path)
		if want := strings.ReplaceAll(test.want, "PATH", test.path) + advice; err == nil || err.Error() != want || r.Servers != nil {
			t.Errorf("%v, %v, want %s", r, err, want)
		}
	}
}

func write(t *testing.T, text string) string {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Whatever the file says, each server has its turn within five seconds.
func TestSchedule(t *testing.T) {
	for _, test := range []struct {
		servers, attempts int
		timeout           time.Duration
		want              string
	}{
		{1, 0, 0, "2 2.5s 5s"},
		{3, 2, 5 * time.Second, "2 833.333333ms 4.999999998s"},
		{2, 1, time.Second, "1 1s 2s"},
		{3, 5, 30 * time.Second, "5 333.333333ms 4.999999995s"},
		{0, 1, time.Second, "1 1s 1s"},
	} {
		r := Resolvers{Servers: threeServers[:test.servers], Timeout: test.timeout, Attempts: test.attempts}
		attempts, turn, total := r.schedule()
		if got := fmt.Sprint(attempts, turn, total); got != test.want {
			t.Errorf("%+v: %s", test, got)
		}
	}
}
