package cli

import (
	"errors"
	"testing"
	"time"
)

// A lifetime that no certificate can have is refused at once, not with each
// connection.
func TestSecretTTL(t *testing.T) {
	for value, want := range map[string]time.Duration{"1s": time.Second, "1500ms": 1500 * time.Millisecond, "24h": 24 * time.Hour} {
		t.Setenv("SECRET_TTL", value)
		if c, err := readMeshConfig(); err != nil || c.ttl != want {
			t.Errorf("%s: %v, %v", value, c.ttl, err)
		}
	}
	for _, value := range []string{"", "500ms", "0", "-1s", "24"} {
		t.Setenv("SECRET_TTL", value)
		_, err := readMeshConfig()
		if want := "SECRET_TTL=" + value + ": it takes a duration such as 5m or 24h, at least 1s"; err == nil || err.Error() != want {
			t.Errorf("%q: %v; want %s", value, err, want)
		}
		if ue := (usageError{}); !errors.As(err, &ue) {
			t.Errorf("%q: no usage error", value)
		}
	}
}
