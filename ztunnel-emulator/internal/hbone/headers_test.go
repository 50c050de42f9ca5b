package hbone

import (
	"net/netip"
	"strings"
	"testing"
)

func TestForwarded(t *testing.T) {
	for _, tc := range []struct{ client, host, want string }{
		{"192.0.2.1:4321", "", `for="192.0.2.1:4321"`},
		{"192.0.2.1:4321", "echo.default.svc.cluster.local", `for="192.0.2.1:4321";host=echo.default.svc.cluster.local`},
		{"[2001:db8::1]:4321", "", `for="[2001:db8::1]:4321"`},
	} {
		got := Forwarded(netip.MustParseAddrPort(tc.client), tc.host)
		if got != tc.want {
			t.Errorf("got %s, want %s", got, tc.want)
		}
		if h := ForwardedHost(got); h != tc.host {
			t.Errorf("host %q, want %q", h, tc.host)
		}
	}
}

func TestForwardedHost(t *testing.T) {
	for value, want := range map[string]string{
		"":                                   "",
		"host=a":                             "a",
		`host="a"`:                           "a",
		`for=x; host=a;host=b`:               "a",
		`host="`:                             `"`,
		"host=é":                             "",
		"for=\"[::1]:1\";host=x.y;proto=tcp": "x.y",
		"nohost=a":                           "",
	} {
		if got := ForwardedHost(value); got != want {
			t.Errorf("%s: got %q, want %q", value, got, want)
		}
	}
}

func TestTraceparent(t *testing.T) {
	a, b := NewTraceparent(), NewTraceparent()
	if a == b || !isTraceparent(a) || !strings.HasPrefix(a, "00-") || !strings.HasSuffix(a, "-00") {
		t.Errorf("%q and %q", a, b)
	}
	if ParseTraceparent(a) != a {
		t.Error("ours is not kept")
	}
	for _, bad := range []string{"", "00", strings.Repeat("0", 55), strings.Repeat("-", 55), a + "0", strings.Replace(a, "00-", "0é", 1)} {
		if got := ParseTraceparent(bad); got == bad || !isTraceparent(got) {
			t.Errorf("%q became %q", bad, got)
		}
	}
}

func TestRequestHeadersOrder(t *testing.T) {
	var names []string
	for _, f := range RequestHeaders("", "f", "t", "n") {
		names = append(names, f.Name)
	}
	if got := strings.Join(names, " "); got != "baggage forwarded traceparent x-forwarded-network" {
		t.Error(got)
	}
}

func FuzzForwardedHost(f *testing.F) {
	f.Add(`for="192.0.2.1:4321";host="a"`)
	f.Add(`host="`)
	f.Fuzz(func(t *testing.T, v string) {
		if h := ForwardedHost(v); !strings.Contains(v, h) {
			t.Errorf("%q from %q", h, v)
		}
	})
}

func FuzzTraceparent(f *testing.F) {
	f.Add(NewTraceparent())
	f.Add(strings.Repeat("-", 55))
	f.Fuzz(func(t *testing.T, v string) {
		if got := ParseTraceparent(v); !isTraceparent(got) || isTraceparent(v) && got != v {
			t.Errorf("%q became %q", v, got)
		}
	})
}
