/* What a stranger may do at our mosquitto: a plugin (of its plugin interface 5, since 2.0).

   mosquitto's own means leave gaps. An acl_file grants every SUBSCRIBE; the dynamic security plugin
   can refuse wildcards, but neither of them refuses sessions that outlive their connection, in which
   a stranger stores what he likes, nor bounds keepalives of MQTT 3.1.1 or subscriptions. So:

       CONNECT    MQTT 3.1.1, a clean session, a keepalive of 1 s to the longest allowed
       SUBSCRIBE  a plain topic of ours, not QoS 2, not more than so many for each connection
       PUBLISH    a plain topic of ours, not QoS 2, not retained, not larger than so much
       delivery   a plain topic of ours (a last will is not checked before)

   The limits come from the configuration (limits.py has them). No header of mosquitto is needed to
   build this, as it is not there where mosquitto is not; the declarations below are those of
   mosquitto_broker.h and mosquitto_plugin.h. */

#include <ctype.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum { INTERFACE = 5 };
enum { EVENT_ACCESS = 2, EVENT_CONNECT = 3 };
enum { SUCCESS = 0, REFUSED = 11, DENIED = 12 };
enum { READ = 1, WRITE = 2, SUBSCRIBE = 4, UNSUBSCRIBE = 8 };
enum { MQTT_3_1_1 = 4 };

struct mosquitto;

struct option {
    char *key, *value;
};

struct connect_event {
    void *future;
    struct mosquitto *client;
    char *username, *password;
    void *future2[4];
};

struct access_event {
    void *future;
    struct mosquitto *client;
    const char *topic;
    const void *payload;
    void *properties;
    int access;
    uint32_t payload_length;
    uint8_t qos;
    bool retain;
    void *future2[4];
};

typedef int callback(int event, void *data, void *user);

extern int mosquitto_callback_register(void *plugin, int event, callback *call, const void *data,
                                       void *user);
extern bool mosquitto_client_clean_session(const struct mosquitto *client);
extern int mosquitto_client_keepalive(const struct mosquitto *client);
extern int mosquitto_client_protocol_version(const struct mosquitto *client);
extern int mosquitto_client_sub_count(const struct mosquitto *client);

static const char prefix[] = "martlet/1/";
static long longest_name, largest_payload, most_subscriptions, longest_keepalive;

static bool is_ours(const char *topic)
{
    if (!topic || strncmp(topic, prefix, sizeof prefix - 1) != 0)
        return false;
    const char *name = topic + sizeof prefix - 1;
    long length = 0;
    for (; name[length]; length++)
        if (length == longest_name || !isascii(name[length]) || !isalnum(name[length]))
            return false;
    return length > 0;
}

static int on_connect(int event, void *data, void *user)
{
    (void)event, (void)user;
    const struct connect_event *asked = data;
    int keepalive = mosquitto_client_keepalive(asked->client);
    bool good = mosquitto_client_protocol_version(asked->client) == MQTT_3_1_1 &&
                mosquitto_client_clean_session(asked->client) && keepalive > 0 &&
                keepalive <= longest_keepalive;
    return good ? SUCCESS : REFUSED;
}

static int on_access(int event, void *data, void *user)
{
    (void)event, (void)user;
    const struct access_event *asked = data;
    bool good = false;
    switch (asked->access) {
    case READ:
        good = is_ours(asked->topic);
        break;
    case WRITE:
        good = is_ours(asked->topic) && asked->qos < 2 && !asked->retain &&
               asked->payload_length <= largest_payload;
        break;
    case SUBSCRIBE:
        good = is_ours(asked->topic) && asked->qos < 2 &&
               mosquitto_client_sub_count(asked->client) < most_subscriptions;
        break;
    case UNSUBSCRIBE:
        good = true;
        break;
    }
    return good ? SUCCESS : DENIED;
}

EXPORT int mosquitto_plugin_version(int count, const int *versions)
{
    for (int i = 0; i < count; i++)
        if (versions[i] == INTERFACE)
            return INTERFACE;
    return -1;
}

EXPORT int mosquitto_plugin_init(void *plugin, void **user, struct option *options, int count)
{
    struct {
        const char *key;
        long *value;
    } known[] = {
        {"name", &longest_name},
        {"payload", &largest_payload},
        {"subscriptions", &most_subscriptions},
        {"keepalive", &longest_keepalive},
    };
    (void)user;
    for (int i = 0; i < count; i++)
        for (size_t k = 0; k < sizeof known / sizeof *known; k++)
            if (strcmp(options[i].key, known[k].key) == 0)
                *known[k].value = strtol(options[i].value, NULL, 10);
    int failed = mosquitto_callback_register(plugin, EVENT_CONNECT, on_connect, NULL, NULL);
    return failed ? failed
                  : mosquitto_callback_register(plugin, EVENT_ACCESS, on_access, NULL, NULL);
}

EXPORT int mosquitto_plugin_cleanup(void *user, struct option *options, int count)
{
    (void)user, (void)options, (void)count;
    return SUCCESS;
}
