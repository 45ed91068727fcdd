package guest

import (
	"context"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/timekeeping"
)

// syncTime compares the clock with the host's, and corrects it by what the host has worked out.
func syncTime(s *agentv1.SyncTime) *agentv1.SyncTimeReply {
	reply := &agentv1.SyncTimeReply{OffsetNanos: time.Now().UnixNano() - s.GetUnixNanos()}
	if by := s.GetCorrectNanos(); by != 0 {
		reply.Error = words(timekeeping.Correct(time.Duration(by)))
	}
	return reply
}

// askTime has the machine's time servers asked: by the image's own service where there is an init to start it, else by the agent, for the
// rest of its life. It returns the servers that the agent beside the init has to ask.
func (a *Agent) askTime(c *agentv1.Config) ([]string, error) {
	servers := c.GetNtpServers()
	if len(servers) == 0 {
		return nil, nil
	}
	if !c.GetInit() {
		go timekeeping.Follow(context.Background(), servers, a.log)
		return nil, nil
	}
	done, err := timekeeping.Delegate("/", servers)
	if done || err != nil {
		return nil, err
	}
	return servers, nil
}
