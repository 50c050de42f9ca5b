package workload

import (
	"net/netip"
	"os"
	"runtime"
	"testing"

	"ambient-emulator/internal/testmain"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { testmain.Run(m) }

func parse(t testing.TB, text string) *State {
	t.Helper()
	s, err := Parse([]byte(text))
	if err != nil {
		t.Fatalf("%v in:\n%s", err, text)
	}
	return s
}

// example is the file of reference/localconfig.md, section 1.4.
func example(t testing.TB) *State {
	t.Helper()
	data, err := os.ReadFile("testdata/example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, string(data))
}

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
